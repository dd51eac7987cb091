"""``dask-zbig import``: an array in a file becomes an array in a database."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import time
from typing import Any

import click
import numpy as np
from ZODB.POSException import POSError

from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cli.common import (
    Progress,
    as_json_option,
    connected,
    find_array,
    opened,
    place_for,
    shortened,
    size_text,
    sizes,
    uri_argument,
)
from dask_zbig.cli.formats import FORMATS, FileArray, RawLayout, format_of, reading
from dask_zbig.cli.transfer import checksum, compare, copy_in
from dask_zbig.errors import ZBigError

__all__ = ["described", "import_", "numbers"]


def numbers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Lengths of axes, such as "100,200" or "100x200"; "()" of none."""
    if value is None:
        return None
    inner = value.strip("()[] ").removesuffix(",")
    try:
        return tuple(int(n) for n in re.split("[,x]", inner)) if inner else ()
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not like 100,200") from error


def _dtype(_: click.Context, __: click.Parameter, value: str | None) -> np.dtype[Any] | None:
    if value is None:
        return None
    try:
        return np.dtype(ast.literal_eval(value) if value.lstrip().startswith(("[", "{", "(")) else value)
    except (TypeError, ValueError, SyntaxError) as error:
        raise click.BadParameter(f"{value!r} is no dtype: {error}") from error


@click.command("import")
@click.argument("file")
@uri_argument
@click.argument("path")
@click.option("--format", "form", type=click.Choice(FORMATS), help="Of FILE. [default: by its suffix]")
@click.option("--dtype", callback=_dtype, help="Of a raw file, as NumPy writes it: f8, i4,f8 or [('t', 'M8[ns]')].")
@click.option("--shape", callback=numbers, help="Of a raw file: 100,200; -1 for what there is. [default: -1]")
@click.option("--offset", type=click.IntRange(0), default=0, help="Of a raw file's first element, in bytes.")
@click.option("--order", type=click.Choice(["C", "F"]), help="Of the array. [default: the file's; of a raw file, C]")
@click.option("--overwrite", is_flag=True, help="Replace what is at PATH.")
@click.option(
    "--transaction-size",
    callback=sizes,
    metavar="SIZE",
    help="Commit after so many bytes, such as 1GiB; PATH still appears at the end only. [default: all at once]",
)
@click.option("--verify", is_flag=True, help="Read file and array again, and compare.")
@as_json_option
def import_(
    file: str,
    uri: str,
    path: str,
    form: str | None,
    dtype: np.dtype[Any] | None,
    shape: tuple[int, ...] | None,
    offset: int,
    order: str | None,
    overwrite: bool,
    transaction_size: int | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Copy the array in FILE into the database URI, to PATH.

    FILE is a .npy file, raw bytes (--dtype, as of numpy.memmap), a Zarr array (x.zarr, x.zarr:name) or a dataset of
    HDF5 (x.h5:name). Any size: memory does not grow with it. PATH is made of keys from the database's root on, with
    "/" between; mappings on the way are made.

    A checksum of the array's bytes is printed, the same that `export` prints and xxh128sum computes. A file of a path
    is made if it is missing.
    """
    form = format_of(file, form, default="raw" if dtype is not None else None)
    if form == "raw" and dtype is None:
        raise click.UsageError("a raw file needs --dtype.")
    if form != "raw" and (dtype is not None or shape is not None or offset):
        raise click.UsageError(
            f"--dtype, --shape and --offset are for a raw file, and {file} is of format {form}: "
            "say --format raw if it is not."
        )
    layout = RawLayout(dtype, shape, order or "C", offset) if dtype is not None else None
    started = time.perf_counter()
    with reading(file, form, layout) as source:
        wanted = order or source.order
        count, total = _store(source, file, uri, path, wanted, overwrite, transaction_size)
        seconds = time.perf_counter() - started
        if verify:
            try:
                _verify(source, uri, path, total)
            except KeyboardInterrupt:
                _say_saved(path)
                raise
    shown = described(source, wanted) | {"path": path, "checksum": total, "seconds": round(seconds, 3)}
    if as_json:
        click.echo(json.dumps(shown | {"transactions": count, "verified": verify}))
        return
    transactions = f"{count} transactions" if count > 1 else "1 transaction"
    click.echo(f"{file} -> {path}: {summary(source, wanted, seconds)}, {transactions}")
    click.echo(f"{total}{', verified' if verify else ''}")


def _store(
    source: FileArray, file: str, uri: str, path: str, order: str, overwrite: bool, every: int | None
) -> tuple[int, str]:
    """Returns the number of transactions, and the checksum."""
    array = ZBigArray(source.shape, source.dtype, order)
    note = f"dask-zbig import of {shortened(file, 200)} to {path}"
    with opened(uri, write=True, create=True) as db, connected(db) as (connection, manager):
        container, name = place_for(connection, path)
        if name in container and not overwrite:
            raise click.ClickException(f"there is something at {path!r} already: use --overwrite to replace it")
        # Until all of it is there, an array that takes several transactions has another name.
        working = name if every is None else f"{name}.importing"
        container[working] = array
        connection.add(array)  # now, that its data goes where the database's does
        oid, count = array._p_oid, 0

        def commit() -> None:
            nonlocal count
            manager.get().note(note)
            manager.commit()
            count += 1

        try:
            with Progress("import", array.nbytes) as progress:
                total = copy_in(source, array, progress.add, commit, every)
            if working != name:
                container[name] = array
                del container[working]
            commit()
        except BaseException:
            with contextlib.suppress(ZBigError, POSError, OSError):  # what went wrong first is to be told
                manager.abort()
                if _is_at(container, name, oid):  # Ctrl-C came in the last commit
                    _say_saved(path)
                else:
                    _forget(container, working, manager, oid)
            raise
    return count, total


def _forget(container: Any, working: str, manager: Any, oid: bytes) -> None:
    if _is_at(container, working, oid):
        del container[working]
        manager.commit()


def _is_at(container: Any, name: str, oid: bytes) -> bool:
    """Whether the database has it there. (An array that was not saved has lost its oid with the abort.)"""
    return name in container and getattr(container[name], "_p_oid", None) == oid


def _say_saved(path: str) -> None:
    click.echo(f"{path}: all of it is saved", err=True)


def _verify(source: FileArray, uri: str, path: str, total: str) -> None:
    with opened(uri) as db, connected(db) as (connection, _):
        array = find_array(connection, path)
        with Progress("verify", array.nbytes) as progress:
            compare(source, array, progress.add)
        if checksum(array) != total:
            raise click.ClickException(f"the array has another checksum when it is read again than {total}")


def described(array: Any, order: str) -> dict[str, Any]:
    """What a transfer is of, for JSON."""
    size = int(np.prod(array.shape, dtype=object)) * array.dtype.itemsize
    return {"shape": list(array.shape), "dtype": str(array.dtype), "order": order, "size": size}


def summary(array: Any, order: str, seconds: float) -> str:
    """The same as text."""
    size = described(array, order)["size"]
    shape = " x ".join(map(str, array.shape)) or "()"
    rate = f" ({size_text(size / seconds)}/s)" if seconds else ""
    return f"{shape} {shortened(str(array.dtype))}, {order} order, {size_text(size)} in {seconds:.1f} s{rate}"
