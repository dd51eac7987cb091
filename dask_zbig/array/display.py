"""What an array looks like: in a notebook, as text, as an object. No data is read for it."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes
from persistent import Persistent
from ZODB.POSException import ConnectionStateError
from ZODB.TimeStamp import TimeStamp

from dask_zbig.errors import ZBigError
from dask_zbig.memory._native import PAGE
from dask_zbig.memory.states import states
from dask_zbig.storage import extents as ex
from dask_zbig.storage.survey import bins_of, survey

if TYPE_CHECKING:
    from dask_zbig.openfile import OpenFile

__all__ = ["ArrayInfo", "Displayed"]

#: Parts of the picture.
BINS = 64
#: Leaves of the extent map, each of which may have to be asked of a server: if there are no more they are all looked
#: at, else some for each part.
LEAVES, PER_BIN = 512, 4

_LONG = 60  # characters of a dtype
_STORED, _CHANGED, _MAPPED = "#3b7dd8", "#e07b39", "#5aa469"


@dataclass(frozen=True, slots=True)
class Picture:
    """An array in equal parts, in the order of memory: how much of each is stored, changed, mapped; 0 to 1."""

    stored: tuple[float, ...]
    changed: tuple[float, ...]
    mapped: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """What is known of an array without reading its data. Printed, it is a table; in a notebook, with a picture.

    Attributes
    ----------
    state : str
        "stored", "not stored yet", "connection closed" or "in memory".
    nbytes : int
        Of all elements.
    stored : int or None
        Bytes that the committed array takes in the database; what was never written takes none.
    extents : int or None
        Contiguous runs of stored bytes: of two arrays of one size, that with fewer is read faster.
    segments, inline : int or None
        The blobs and objects that hold them; how many of these are objects.
    exact : bool
        If False, the four above are lower bounds: only a part of a large extent map was looked at.
    changed : int or None
        Bytes of pages that are not committed yet. Of some of them only a part was changed.
    mapped : int or None
        Bytes that are mapped into this process: to read them takes no page fault of ours.
    snapshot : datetime or None
        When that was committed which the connection shows, or something later that leaves the array as it is. UTC.
    tid : str or None
        The transaction's id, in hexadecimal.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    order: str
    state: str
    nbytes: int
    stored: int | None = None
    extents: int | None = None
    segments: int | None = None
    inline: int | None = None
    exact: bool = True
    changed: int | None = None
    mapped: int | None = None
    snapshot: datetime | None = None
    tid: str | None = None
    picture: Picture | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        values = asdict(self)
        values["shape"] = list(self.shape)
        values["snapshot"] = self.snapshot.isoformat() if self.snapshot else None
        return values

    def rows(self) -> list[tuple[str, str]]:
        """What it says, as pairs of texts."""
        shape = " x ".join(f"{n:,}" for n in self.shape) or "()"
        dtype = self.dtype if len(self.dtype) <= _LONG else f"{self.dtype[:_LONG]}..."
        rows = [("Shape", shape), ("Type", f"{dtype}, {self.order} order"), ("Size", _size(self.nbytes))]
        least = "" if self.exact else "at least "
        if self.stored is not None:
            rows.append(("Stored", f"{least}{_size(self.stored)}{self._percent()}"))
            inline = f", {self.inline:,} of them inline" if self.inline else ""
            segments = f"{self.segments:,} segment{'s' if self.segments != 1 else ''}{inline}"
            rows.append(("Extents", f"{least}{self.extents:,} in {segments}" if self.extents else "none"))
        if self.changed is not None:
            rows.append(("Uncommitted", _size(self.changed)))
        if self.mapped is not None:
            rows.append(("Mapped", _size(self.mapped)))
        if self.snapshot is not None:
            rows.append(("Snapshot", f"{self.snapshot:%Y-%m-%d %H:%M:%S} UTC"))
        if self.state != "stored":
            rows.append(("State", self.state))
        return rows

    def _percent(self) -> str:
        if not self.stored or not self.exact:
            return ""
        part = self.stored / self.nbytes
        return f" ({part:.0%})" if part >= 0.005 else " (< 1%)"

    def __str__(self) -> str:
        return "\n".join([self.kind, *(f"  {name:<12} {text}" for name, text in self.rows())])

    def _repr_html_(self) -> str:
        cell = 'style="text-align: left; padding: 1px 12px 1px 0"'
        body = "".join(f"<tr><th {cell}>{name}</th><td {cell}>{_escape(text)}</td></tr>" for name, text in self.rows())
        title = f'<tr><th {cell} colspan="2">{_escape(self.kind)}</th></tr>'
        svg = self._svg() if self.picture and self.nbytes else ""
        picture = f'<td style="padding: 24px 0 0 20px; vertical-align: top">{svg}</td>' if svg else ""
        table = f'<table style="border-collapse: collapse">{title}{body}</table>'
        return f'<table class="zbig-array"><tr><td style="vertical-align: top">{table}</td>{picture}</tr></table>'

    def _svg(self) -> str:
        """Three bars, from the first byte to the last."""
        assert self.picture is not None
        wide, high, left, gap = 256, 14, 84, 8
        rows = [
            ("stored", self.picture.stored, _STORED),
            ("uncommitted", self.picture.changed, _CHANGED),
            ("mapped", self.picture.mapped, _MAPPED),
        ]
        out = []
        for n, (name, bins, colour) in enumerate(rows):
            y = n * (high + gap)
            out.append(f'<text x="{left - 8}" y="{y + high - 3}" text-anchor="end">{name}</text>')
            out.append(
                f'<rect x="{left}" y="{y}" width="{wide}" height="{high}" fill="currentColor" fill-opacity="0.08"/>'
            )
            out += [
                f'<rect x="{left + a * wide / len(bins):.2f}" y="{y}" width="{(b - a) * wide / len(bins):.2f}" '
                f'height="{high}" fill="{colour}" fill-opacity="{value:.2f}"/>'
                for a, b, value in _runs(bins)
            ]
        y = len(rows) * (high + gap) + 4
        out.append(f'<text x="{left}" y="{y + 2}">0</text>')
        out.append(f'<text x="{left + wide}" y="{y + 2}" text-anchor="end">{_size(self.nbytes)}</text>')
        return (
            f'<svg width="{left + wide + 2}" height="{y + 8}" font-size="11" font-family="sans-serif" '
            f'fill="currentColor" role="img" aria-label="What is stored, uncommitted and mapped, by position">'
            f"{''.join(out)}</svg>"
        )


class Displayed:
    """A mixin: how arrays are shown."""

    __slots__ = ()

    def info(self, *, exact: bool = False) -> ArrayInfo:
        """What is known of the array without reading its data: what it takes on disk, what is uncommitted, and so on.

        Parameters
        ----------
        exact : bool
            Look at all of a large array's extent map. Otherwise it takes milliseconds whatever the size, or, if the
            map must be fetched from a server, some hundred round trips.

        Returns
        -------
        ArrayInfo

        Examples
        --------
        >>> import dask_zbig as dz
        >>> print(dz.RAMArray((2, 3), "i4").info())
        RAMArray
          Shape        2 x 3
          Type         int32, C order
          Size         24 B
          State        in memory
        """
        return _info(self, exact)

    def _repr_html_(self) -> str:
        return _info(self, False)._repr_html_()


def _info(array: Any, exact: bool) -> ArrayInfo:
    kind = type(array).__name__
    values: dict[str, Any] = {
        "kind": kind,
        "shape": array.shape,
        "dtype": str(array.dtype),
        "order": array.order,
        "nbytes": array.nbytes,
    }
    if not isinstance(array, Persistent):
        return ArrayInfo(state="in memory", **values)
    connection = array._p_jar
    if connection is not None and connection.opened is None:
        return ArrayInfo(state="connection closed", **values)
    opened = array._open()
    with opened.turn, contextlib.suppress(ConnectionStateError):  # (closed meanwhile, by another thread)
        values |= _committed(opened, array.nbytes, exact)
        if connection is not None and array._p_serial != bytes(8):
            return ArrayInfo(state="stored", **_snapshot(connection), **values)
        return ArrayInfo(state="not stored yet", **values)
    return ArrayInfo(state="connection closed", **values)


def _committed(opened: OpenFile, size: int, exact: bool) -> dict[str, Any]:
    exact = exact or sum(1 for _ in itertools.islice(opened.file.leaves(0, size), LEAVES + 1)) <= LEAVES
    seen = survey(opened.file, size, bins=BINS, per_bin=None if exact else PER_BIN)
    inline, _, _ = seen.kind(inline=True)
    runs, written = states(opened.space.windows())
    mapped = ex.intersect(ex.normalize(runs or ex.no_ranges()), ex.one_range(0, size))
    # By position, and by number: what another thread writes meanwhile may be in one and not in the other.
    pages = opened.space.dirty_pages
    changed = ex.normalize(written if written and pages else ex.no_ranges())
    layers = ex.no_ranges()
    for layer in opened.layers:
        layers = ex.union(layers, ex.covered(layer.extents))
    changed = ex.intersect(ex.union(changed, layers), ex.one_range(0, size))
    return {
        "stored": seen.stored,
        "extents": seen.extents,
        "segments": len(seen.segments),
        "inline": inline,
        "exact": seen.exact,
        "changed": min(max(pages * PAGE, ex.total(changed)), size),
        "mapped": ex.total(mapped),
        "picture": Picture(seen.bins, _filled(changed, size), _filled(mapped, size)),
    }


def _snapshot(connection: Any) -> dict[str, Any]:
    from dask_zbig.database import snapshot

    try:
        tid = snapshot(connection)
    except ZBigError:  # none yet
        return {}
    when = datetime.fromtimestamp(TimeStamp(tid).timeTime(), timezone.utc)
    return {"tid": tid.hex(), "snapshot": when.replace(microsecond=0)}


def _filled(ranges: ex.Ranges, size: int) -> tuple[float, ...]:
    """How much of each part of [0, size) the ranges have."""
    return tuple(ex.total(ex.intersect(ranges, ex.one_range(lo, hi))) / (hi - lo) for lo, hi in bins_of(size, BINS))


def _runs(bins: tuple[float, ...]) -> list[tuple[int, int, float]]:
    """Neighbours that look alike, joined: (first, last + 1, how dark). What is there at all shall be seen."""
    runs: list[tuple[int, int, float]] = []
    for n, part in enumerate(bins):
        shade = round(0.45 + 0.55 * part, 1) if part else 0.0
        if runs and runs[-1][2] == shade:
            runs[-1] = (runs[-1][0], n + 1, shade)
        else:
            runs.append((n, n + 1, shade))
    return [run for run in runs if run[2]]


def _size(size: int) -> str:
    return str(format_bytes(size)).replace("kiB", "KiB")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
