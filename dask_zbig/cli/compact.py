"""``dask-zbig compact``: join what arrays have in many small pieces."""

from __future__ import annotations

import json

import click

from dask_zbig.cli.common import Progress, arrays, as_json_option, connected, opened, size_text, sizes, uri_argument
from dask_zbig.compacting import CompactReport, compact_array

__all__ = ["compact"]


@click.command()
@uri_argument
@click.argument("path", default="")
@click.option(
    "--transaction-size",
    callback=sizes,
    metavar="SIZE",
    default="256MiB",
    show_default=True,
    help="Commit after so many bytes were copied.",
)
@as_json_option
def compact(uri: str, path: str, transaction_size: int, as_json: bool) -> None:
    """Join the small segments of the array at PATH in the database URI, or of all arrays there.

    Commits of small changes do this for themselves, a little at a time. This does it for all of an array: afterwards it
    is read faster, and its map is smaller. Blobs of which most was overwritten are copied, so that the next pack can
    remove them. Others may read and write meanwhile.
    """
    done: dict[str, CompactReport] = {}
    with opened(uri, write=True) as db:
        with connected(db) as (connection, _):
            found = [(name, array._p_oid) for name, array in arrays(connection, path)]
        for name, oid in found:
            with Progress(f"compact {name}", 0, unit="parts") as progress:
                done[name] = compact_array(db, oid, transaction_size=transaction_size, progress=progress.at)
    if as_json:
        click.echo(json.dumps([{"path": name} | report.to_dict() for name, report in done.items()]))
        return
    for name, report in done.items():
        if not report.transactions:
            click.echo(f"{name}: nothing to join")
            continue
        click.echo(
            f"{name}: {_change(report.extents)} extents, {_change(report.segments)} segments, "
            f"{size_text(report.bytes)} copied in {report.transactions} transaction{'s' * (report.transactions != 1)}"
        )
    if not done:
        click.echo("no arrays")


def _change(numbers: tuple[int, int]) -> str:
    before, after = numbers
    return f"{before:,} -> {after:,}" if before != after else f"{before:,}"
