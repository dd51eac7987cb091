"""``dask-zbig pack``: give back the space of what nothing refers to any more."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import click

from dask_zbig.cli.common import Progress, as_json_option, opened, size_text, uri_argument

__all__ = ["pack"]


@click.command()
@uri_argument
@click.option(
    "--days",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="How much of the past to keep. Cluster jobs that run, and `at=`, need what they read.",
)
@as_json_option
def pack(uri: str, days: float, as_json: bool) -> None:
    """Remove from the database URI what was overwritten or deleted more than --days ago, to give back its space.

    Afterwards older snapshots cannot be read. Others may use the database meanwhile, if it is served.
    """
    with opened(uri, write=True) as db:
        before, started = _sizes(db), time.perf_counter()
        with Progress("pack", before["objects"]) as progress, _watched(db, progress):
            db.pack(time.time() - days * 86400)
        after, seconds = _sizes(db), time.perf_counter() - started
    if as_json:
        click.echo(json.dumps({"days": days, "seconds": round(seconds, 3), "before": before, "after": after}))
        return
    kinds = [f"{kind} {size_text(before[kind])} -> {size_text(after[kind])}" for kind in before]
    click.echo(f"packed in {seconds:.1f} s: {', '.join(kinds)}")


@contextlib.contextmanager
def _watched(db: Any, progress: Progress) -> Iterator[None]:
    """Show how far ZODB is with packing, which it does not say: by the size of what it writes, if that is here."""
    name = getattr(db.storage, "_file_name", None)
    total, done = int(db.getSize()), threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            try:
                progress.at(min(os.path.getsize(f"{name}.pack"), total), total)
            except FileNotFoundError:  # it looks for what is referred to; or a server packs
                progress.wait()

    watcher = threading.Thread(target=watch, name="zbig-pack-progress")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _sizes(db: Any) -> dict[str, int]:
    """Bytes of the objects, and of the blobs, if they are here."""
    sizes = {"objects": int(db.getSize())}
    helper = getattr(db.storage, "fshelper", None)
    if helper is not None and getattr(db.storage, "shared_blob_dir", True):
        sizes["blobs"] = sum(
            os.lstat(os.path.join(folder, name)).st_size
            for folder, _, names in os.walk(helper.base_dir)
            for name in names
            if name.endswith(".blob")
        )
    return sizes
