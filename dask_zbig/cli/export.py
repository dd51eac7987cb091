"""``dask-zbig export``: an array in a database becomes an array in a file."""

from __future__ import annotations

import json
import time

import click

from dask_zbig.cli.common import Progress, as_json_option, connected, find_array, opened, uri_argument
from dask_zbig.cli.formats import FORMATS, RawLayout, creating, format_of, reading
from dask_zbig.cli.import_ import described, numbers, summary
from dask_zbig.cli.transfer import compare, copy_out

__all__ = ["export"]


@click.command()
@uri_argument
@click.argument("path")
@click.argument("file")
@click.option("--format", "form", type=click.Choice(FORMATS), help="Of FILE. [default: by its suffix]")
@click.option("--chunks", callback=numbers, help="Of Zarr and HDF5: 1000,1000. [default: 16 MiB, 1 MiB]")
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
@click.option("--verify", is_flag=True, help="Read file and array again, and compare.")
@as_json_option
def export(
    uri: str,
    path: str,
    file: str,
    form: str | None,
    chunks: tuple[int, ...] | None,
    overwrite: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Copy the array at PATH in the database URI to FILE.

    FILE is a .npy file, raw bytes (x.raw, for numpy.memmap), a Zarr array (x.zarr, x.zarr:name) or a dataset of HDF5
    (x.h5:name). Any size: memory does not grow with it. What was never written takes no space in FILE either. All is
    of one snapshot, whatever is committed meanwhile. FILE appears when it is whole.

    A checksum of the array's bytes is printed, the same that `import` prints and xxh128sum computes.
    """
    form = format_of(file, form)
    if chunks is not None and form not in ("zarr", "hdf5"):
        raise click.UsageError(f"a {form} file has no chunks.")
    with opened(uri) as db, connected(db) as (connection, _):
        array = find_array(connection, path)
        started = time.perf_counter()
        with (
            Progress("export", array.nbytes) as progress,
            creating(file, form, array, chunks=chunks, overwrite=overwrite) as target,
        ):
            total = copy_out(array, target, progress.add)
        seconds = time.perf_counter() - started
        if verify:
            layout = RawLayout(array.dtype, array.shape, array.order) if form == "raw" else None
            with reading(file, form, layout) as written, Progress("verify", array.nbytes) as progress:
                compare(written, array, progress.add)
        shown = described(array, array.order) | {"file": file, "checksum": total, "seconds": round(seconds, 3)}
        text = summary(array, array.order, seconds)
    if as_json:
        click.echo(json.dumps(shown | {"verified": verify}))
        return
    click.echo(f"{path} -> {file}: {text}")
    click.echo(f"{total}{', verified' if verify else ''}")
