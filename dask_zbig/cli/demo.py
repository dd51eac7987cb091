"""``dask-zbig demo``: how much of the Earth is land? The whole path once, on real data, checked."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import click
import transaction

import dask_zbig as dz
from dask_zbig.cli.demo_check import check
from dask_zbig.cli.demo_cluster import MEMORY, Watch, cluster
from dask_zbig.cli.demo_data import LandMask, find_mask
from dask_zbig.cli.demo_job import Answer, import_mask, land_fractions, save_land
from dask_zbig.cli.demo_report import PeakMemory, Report, mib, percent
from dask_zbig.storage.tempdir import PrivateDirectory

__all__ = ["demo", "run"]

_DATABASE = "earth.fs"
_PICTURE = "dask-zbig-demo.png"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.option("--keep", type=click.Path(file_okay=False), help="Leave the database and the map in this directory.")
@click.option("--kill-worker", is_flag=True, help="Kill a worker process in the middle of the save.")
@click.option("--map", "picture", type=click.Path(dir_okay=False), help=f"The picture. [default: {_PICTURE}]")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Worker processes.")
def demo(keep: str | None, kill_worker: bool, picture: str | None, workers: int) -> None:
    """Compute from an 890 MiB mask how much of the Earth is land.

    A server and worker processes are started. The mask is imported into an array; the workers compute from it,
    and write two more arrays in one atomic save. A fresh process checks everything against NumPy. Takes a minute
    and 2 GiB of disk, and leaves nothing but a map, unless told to.
    """
    run(find_mask(), keep=keep, kill_worker=kill_worker, picture=picture, workers=workers)


def run(
    source: LandMask,
    *,
    keep: str | None = None,
    kill_worker: bool = False,
    picture: str | None = None,
    workers: int = 2,
) -> Answer:
    """What the command does, with any mask."""
    started = time.perf_counter()
    picture = picture or os.path.join(keep or ".", _PICTURE)
    report = Report()
    with _stoppable(report) as begin_cleaning, ExitStack() as stack:
        private = stack.enter_context(closing(PrivateDirectory("demo", _base())))
        path = _prepare(keep or private.path, picture, source)
        memory = stack.enter_context(PeakMemory())
        _introduce(report, source, path, keep)
        with report.step("start", f"ZEO server, {workers} workers of {MEMORY}"):
            uri = stack.enter_context(dz.serve(path))
            client, watch = stack.enter_context(cluster(workers, private.path))
        try:
            answer = _steps(report, source, uri, client if kill_worker else None, watch)
            with report.step("draw", os.path.normpath(picture)):
                _draw(uri, answer, picture)
        finally:
            begin_cleaning()
        stack.close()
        _conclude(report, answer, memory, time.perf_counter() - started)
        if keep:
            report.line(f"kept: dask_zbig.open({path!r})")
    return answer


def _steps(report: Report, source: LandMask, uri: str, client: Any, watch: Watch) -> Answer:
    """Import, compute, save, check. With a client, kill a worker."""
    db = dz.open(uri)
    connection = db.open()
    try:
        with report.step("import", "the mask, in one transaction", source.nbytes) as step:
            import_mask(connection, source, step.progress)
        with report.step("compute", "land by latitude, by the workers", source.nbytes) as step:
            watch.begin(step.progress)
            answer = land_fractions(connection, source)
        with report.step("save", "2 arrays by the workers, atomically") as step:
            watch.begin(step.progress)
            if client is not None:
                watch.kill_in_the_middle(client.run(os.getpid))
            step.size = save_land(connection, source, answer).bytes
        if client is not None:
            report.line(f"  {'':<9}{_killed(watch)}")
    finally:
        transaction.abort()
        connection.close()
        db.close()
    with report.step("check", "a new process compares with NumPy", 2 * source.nbytes) as step:
        differences = check(uri, source, step.progress)
        step.what = "equal to NumPy's, in a new process" if differences.none else "DIFFERENT from NumPy's"
    if not differences.none:
        raise click.ClickException(f"the check failed: {differences}")
    return answer


def _killed(watch: Watch) -> str:
    if not watch.killed:
        raise click.ClickException("no worker was killed: the save was over before it was half done")
    return (
        f"worker {watch.killed} killed after {watch.killed_after} of {watch.staged_total} writes, "
        f"{watch.again} of them done again"
    )


def _base() -> str | None:
    """Where large temporary files belong: /tmp is memory on many systems."""
    chosen = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return None if chosen or not os.access("/var/tmp", os.W_OK) else "/var/tmp"


def _prepare(directory: str, picture: str, source: LandMask) -> str:
    """Find out now what would fail later. Returns the path of the database to be."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"{directory}: {error.strerror}") from error
    path = os.path.join(os.path.abspath(directory), _DATABASE)
    if os.path.exists(path):
        raise click.ClickException(f"{path} exists already: remove it, or keep this one elsewhere")
    folder = os.path.dirname(os.path.abspath(picture))
    if not os.access(folder, os.W_OK):
        raise click.ClickException(f"the map cannot be written: {folder} is no directory that you may write to")
    need, free = 2 * source.nbytes + (64 << 20), shutil.disk_usage(directory).free
    if free < need:
        raise click.ClickException(
            f"{directory} has {mib(free)} free, and {mib(need)} are needed: set TMPDIR, or use --keep DIR"
        )
    return path


def _introduce(report: Report, source: LandMask, path: str, keep: str | None) -> None:
    rows, columns = source.shape
    report.line("dask-zbig demo: how much of the Earth is land?", bold=True)
    report.line()
    report.line(f"  input    {rows} x {columns} cells, True = water, {mib(os.path.getsize(source.path))} compressed")
    report.line(f"  database {path}, {'kept' if keep else 'temporary'}")
    report.line()
    report.header()


def _draw(uri: str, answer: Answer, picture: str) -> None:
    from dask_zbig.cli.demo_map import draw_map  # needs pillow

    db = dz.open(uri)
    try:
        with db.transaction() as connection:
            draw_map(connection.root()["land_fraction"][:], *answer, picture)
    finally:
        db.close()


def _conclude(report: Report, answer: Answer, memory: PeakMemory, seconds: float) -> None:
    earth, bands = answer
    report.line()
    report.line(f"  {'latitude':<10}{'north':<34}south")
    half = len(bands) // 2
    for k in range(half):
        degrees = f"{k * 90 // half}-{(k + 1) * 90 // half}"
        report.line(f"  {degrees:<10}{_bar(bands[half - 1 - k])}{_bar(bands[half + k])}".rstrip())
    report.line()
    report.line(f"{percent(earth)} of the Earth is land.", bold=True)
    report.line(
        f"{seconds:.0f} s in all. Peak memory of all processes: {mib(memory.private)}, "
        f"{mib(memory.total)} with mapped files."
    )


def _bar(fraction: float) -> str:
    return f"{'#' * round(fraction * 20):<21}{percent(fraction):>7}      "


@contextmanager
def _stoppable(report: Report) -> Iterator[Callable[[], None]]:
    """Let Ctrl-C and its like unwind everything. What is yielded says that unwinding has begun: no more of them."""
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        if not stopped:
            click.echo("\nstopped, cleaning up", err=True)
        stopped.append(number)
        logging.disable()  # what is interrupted may complain
        raise SystemExit(128 + number)

    def stop_again() -> None:
        if stopped:  # Python drops what is raised while a finalizer runs
            raise SystemExit(128 + stopped[0])

    report.check = stop_again

    def ignore() -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if not (stopped and isinstance(what.exc_value, SystemExit)):  # (see `stop_again`)
            hook(what)

    disabled, hook = logging.root.manager.disable, sys.unraisablehook
    sys.unraisablehook = dropped
    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield ignore
    finally:
        logging.disable(disabled)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
