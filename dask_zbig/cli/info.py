"""``dask-zbig info``: how an array lies in its database."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import click
from ZODB.POSException import POSError

from dask_zbig.array.display import ArrayInfo
from dask_zbig.cli.common import as_json_option, connected, find_array, moment, opened, size_text, table, uri_argument
from dask_zbig.memory._native import PAGE
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.reader import reader
from dask_zbig.storage.survey import Survey, survey

__all__ = ["info"]

#: Transactions that are shown, and segments of which it is asked whether they are here.
_LAST, _ASKED = 5, 10_000
_CELLS = 64
_SHADES = " .:-=+*#%@"


@click.command()
@uri_argument
@click.argument("path")
@as_json_option
def info(uri: str, path: str, as_json: bool) -> None:
    """Show how the array at PATH in the database URI is laid out and stored. No data is read.

    That is: its layout in memory; what of it is stored, in which segments (blobs, or inline: in objects), and how
    fragmented; its last transactions; and how much of it this host has already.
    """
    with opened(uri) as db, connected(db) as (connection, _):
        array = find_array(connection, path)
        shown = array.info(exact=True)
        seen = survey(array._file, array.nbytes, bins=_CELLS)
        details = {
            "layout": _layout(array),
            "storage": _segments(seen),
            "transactions": _transactions(db, array, seen),
            "local": _local(db, seen),
        }
    if as_json:
        plain = {key: value for key, value in shown.to_dict().items() if key not in ("picture", "changed", "mapped")}
        click.echo(json.dumps({"path": path} | plain | details))
    else:
        click.echo(_text(path, shown, seen, details))


def _layout(array: Any) -> dict[str, Any]:
    return {
        "itemsize": array.itemsize,
        "strides": list(array.strides),
        "major_axis": array.major_axis if array.ndim else None,
        "attributes": sorted(k for k in vars(array) if not k.startswith(("_p_", "_v_", "_"))),
    }


def _segments(seen: Survey) -> dict[str, Any]:
    """Kinds, and fragmentation."""
    result: dict[str, Any] = {}
    for name, inline in (("blobs", False), ("inline", True)):
        count, size, live = seen.kind(inline=inline)
        result[name] = {"count": count, "bytes": size, "live": live}
    result["extents_per_leaf"] = {
        "leaves": seen.leaves,
        "mean": round(seen.extents / seen.leaves, 1) if seen.leaves else 0,
        "most": seen.fullest,
    }
    return result


def _transactions(db: Any, array: Any, seen: Survey) -> list[dict[str, Any]]:
    """The last ones that changed an object of the array, the last first."""
    changed = {tid: list(oids) for tid, oids in seen.serials.items()}
    for obj in (array, array._file, array._file.truncation, array._file.journal):
        obj._p_activate()
        changed.setdefault(obj._p_serial, []).append(obj._p_oid)
    result = []
    for tid in sorted(changed, reverse=True)[:_LAST]:
        told = _told(db, changed[tid][0], tid)
        result.append({"tid": tid.hex(), "time": moment(tid), "objects": len(changed[tid]), **told})
    return result


def _told(db: Any, oid: bytes, tid: bytes) -> dict[str, str]:
    """Who made a transaction, and what they said of it, if the storage knows."""
    with contextlib.suppress(POSError, NotImplementedError):
        for entry in db.storage.history(oid, size=16):
            if entry["tid"] == tid:
                return {"user": _decoded(entry["user_name"]).strip(), "note": _decoded(entry["description"])}
    return {"user": "", "note": ""}


def _decoded(text: str | bytes) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def _local(db: Any, seen: Survey) -> dict[str, Any]:
    """What need not be fetched from a server."""
    reads = reader(db)
    asked = size = live = 0
    for use in seen.segments.values():
        if use.ref.inline:
            continue
        if asked == _ASKED:
            break
        asked += 1
        if reads.source(use.ref).local():
            size += use.ref.length
            live += use.live
    blobs = seen.kind(inline=False)
    return {"blob_bytes": size, "live": live, "of": blobs[1], "exact": asked == blobs[0]}


def _text(path: str, shown: ArrayInfo, seen: Survey, details: dict[str, Any]) -> str:
    layout, segments, local = details["layout"], details["storage"], details["local"]
    rows = [row for row in shown.rows() if row[0] not in ("Uncommitted", "Mapped")]
    axis = "" if layout["major_axis"] is None else f", grows along axis {layout['major_axis']}"
    rows.insert(2, ("Strides", f"{', '.join(map(str, layout['strides'])) or 'none'} bytes{axis}"))
    if layout["attributes"]:
        rows.append(("Attributes", ", ".join(layout["attributes"])))
    for name, label in (("blobs", "Blobs"), ("inline", "Inline")):
        kind = segments[name]
        waste = kind["bytes"] - kind["live"]
        share = f", {kind['live'] / seen.stored:.0%} of what is stored" if seen.stored else ""
        # (each begins and ends with whole pages, so that much says nothing)
        dead = f", {size_text(waste)} more overwritten" if waste > 2 * PAGE * kind["count"] else ""
        rows.append((label, f"{kind['count']:,} with {size_text(kind['live'])}{share}{dead}"))
    parts = segments["extents_per_leaf"]
    rows.append(
        (
            "Fragments",
            f"{parts['mean']} extents for each {size_text(LEAF_BYTES)} on average, {parts['most']} at most"
            + ("; `dask-zbig compact` joins them" if parts["most"] > 64 else ""),
        )
    )
    least = "" if local["exact"] else "at least "
    rows.append(("On this host", f"{least}{size_text(local['blob_bytes'])} of {size_text(local['of'])} in blobs"))
    lines = [path, *(f"  {name:<12} {text}" for name, text in rows)]
    if seen.stored:
        lines.append(f"  {'Map':<12} [{''.join(map(_shade, seen.bins))}]")
    last = [
        (t["time"] or "", t["tid"], str(t["objects"]), t["user"], t["note"].partition("\n")[0])
        for t in details["transactions"]
    ]
    lines += ["", "Last transactions", *_indented(table(("time", "id", "objects", "user", "note"), last))]
    return "\n".join(lines)


def _shade(part: float) -> str:
    return _SHADES[max(1, round(part * (len(_SHADES) - 1)))] if part else " "


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
