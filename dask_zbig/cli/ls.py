"""``dask-zbig ls``: the arrays in a database."""

from __future__ import annotations

import json
from typing import Any

import click
from ZODB.POSException import POSError

from dask_zbig.cli.common import (
    arrays,
    as_json_option,
    connected,
    opened,
    shortened,
    size_text,
    table,
    uri_argument,
)
from dask_zbig.errors import ZBigError
from dask_zbig.storage.survey import survey

__all__ = ["ls"]

_HEADER = ("path", "shape", "dtype", "order", "size", "stored", "extents")
_RIGHT = ("size", "stored", "extents")
#: Objects read between two looks at the cache of the connection.
_AT_ONCE = 100


@click.command()
@uri_argument
@click.argument("path", default="")
@as_json_option
def ls(uri: str, path: str, as_json: bool) -> None:
    """List the arrays in the database URI, or below PATH in it.

    PATH is made of keys, from the root of the database on, with "/" between. Arrays are found in mappings, BTrees and
    sequences. `size` is what an array would take in memory, `stored` what it takes on disk: what was never written
    takes nothing. No data is read.
    """
    with opened(uri) as db, connected(db) as (connection, _):
        found = []
        for n, (name, array) in enumerate(arrays(connection, path)):
            found.append(_row(name, array))
            if n % _AT_ONCE == _AT_ONCE - 1:
                connection.cacheGC()
    click.echo(json.dumps(found) if as_json else _text(found))
    damaged = [row for row in found if "error" in row]
    for row in damaged:
        click.echo(f"{row['path']}: {row['error']}", err=True)
    if damaged:
        raise click.exceptions.Exit(1)


def _row(path: str, array: Any) -> dict[str, Any]:
    try:
        seen = survey(array._file, array.nbytes)
    except (ZBigError, POSError) as error:
        return {"path": path, "error": f"{type(error).__name__}: {error}"}
    return {
        "path": path,
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "order": array.order,
        "size": array.nbytes,
        "stored": seen.stored,
        "extents": seen.extents,
    }


def _text(found: list[dict[str, Any]]) -> str:
    rows = [
        (
            row["path"],
            " x ".join(map(str, row["shape"])) or "()",
            shortened(row["dtype"]),
            row["order"],
            size_text(row["size"]),
            size_text(row["stored"]),
            f"{row['extents']:,}",
        )
        if "error" not in row
        else (row["path"], "damaged", *[""] * 5)
        for row in found
    ]
    return table(_HEADER, rows, right=_RIGHT) if rows else "no arrays"
