"""``dask-zbig check``: is what a database says it holds really there?"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, NoReturn

import click
from dask.utils import format_bytes
from ZODB.POSException import POSError

from dask_zbig.checking import CheckReport
from dask_zbig.checking import check as check_database
from dask_zbig.errors import ZBigError

__all__ = ["check"]


@click.command()
@click.argument("uri")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def check(uri: str, paths: tuple[str, ...], as_json: bool) -> None:
    """Verify the arrays in the database URI, or only those at PATH and below: every byte that is stored is read.

    That is: the parts of each array's map are there, and say nothing impossible; each segment of bytes is there, has
    its length, and its checksum. What is damaged is named, one line each. Nothing is changed.

    Exit status: 0 if all is sound, 1 if something is damaged, 2 if the database cannot be read at all.
    """
    progress = _Progress(sys.stderr.isatty() and not as_json)
    try:
        report = check_database(uri, paths, progress=progress)
    except (ZBigError, POSError, OSError) as error:
        progress.end()
        _fail(error)
    progress.end()
    click.echo(json.dumps(report.to_dict()) if as_json else _text(report))
    sys.exit(0 if report.sound else 1)


def _fail(error: Exception) -> NoReturn:
    text = str(error) if isinstance(error, ZBigError) else f"{type(error).__name__}: {error}"
    raise _Unreadable(text) from error


class _Unreadable(click.ClickException):
    exit_code = 2


def _text(report: CheckReport) -> str:
    lines = [f"{damage.kind} {damage.oid}, {damage}" for damage in report.damages]
    lines.append(
        f"{report.arrays} arrays, {report.segments} segments, {format_bytes(report.bytes)} as of transaction "
        f"0x{report.snapshot}: {'sound' if report.sound else f'{len(report.damages)} DAMAGED'}"
    )
    return "\n".join(lines)


class _Progress:
    """A line on a terminal that says how far it is."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._next = 0.0

    def __call__(self, done: int, path: str) -> None:
        now = time.monotonic()
        if self._shown and now >= self._next:
            self._next = now + 0.2
            click.echo(f"\r\x1b[K{format_bytes(done)} {path}"[:100], err=True, nl=False)

    def end(self, *_: Any) -> None:
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)
