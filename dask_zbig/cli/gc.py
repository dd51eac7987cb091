"""``dask-zbig gc``: remove what dead processes have left in a database and beside it."""

from __future__ import annotations

import json

import click
from dask.utils import format_bytes, format_time
from ZODB.POSException import POSError

from dask_zbig.cluster.janitor import GarbageReport, collect_garbage
from dask_zbig.tempfiles import OLD

__all__ = ["gc"]


@click.command()
@click.argument("uri")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--old",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=OLD,
    show_default=True,
    help="When a file is garbage if only its age tells. Must be longer than any transaction takes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def gc(uri: str, dry_run: bool, old: float, as_json: bool) -> None:
    """Remove what processes that died have left in the database URI, and beside it.

    That is: data staged for a cluster's save but never published, if the lease of the job is over; and temporary
    files. URI is a path or a URI, such as `dask-zbig serve` prints. Living processes are not disturbed.

    Disk space of staged data comes back at the next pack of the database.
    """
    try:
        report = collect_garbage(uri, dry_run=dry_run, old=old)
    except (POSError, OSError) as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    click.echo(json.dumps(report.to_dict()) if as_json else _text(report))


def _text(report: GarbageReport) -> str:
    lines = [
        f"job {job.id}, begun {format_time(job.age)} ago: {job.segments} segments, {format_bytes(job.bytes)}"
        for job in report.jobs
    ]
    lines += [
        f"file {file.path}, changed {format_time(file.age)} ago: {format_bytes(file.bytes)}" for file in report.files
    ]
    did = "Would remove" if report.dry_run else "Removed"
    lines.append(
        f"{did} {len(report.jobs)} expired jobs ({format_bytes(report.staged_bytes)}, which the next pack gives back) "
        f"and {len(report.files)} temporary files ({format_bytes(report.file_bytes)})."
    )
    return "\n".join(lines)
