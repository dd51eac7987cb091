"""Arrays in files of other formats, read and written box by box: .npy, raw bytes, Zarr, HDF5.

A *box* is a tuple of slices, one for each axis, with a start and a stop.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import click
import numpy as np
import numpy.typing as npt
from dask.array.core import normalize_chunks

from dask_zbig.array.indexing import locate
from dask_zbig.errors import ZBigError

__all__ = ["FORMATS", "Box", "ChunkedFile", "FileArray", "FlatFile", "RawLayout", "creating", "format_of", "reading"]

Box = tuple[slice, ...]

FORMATS = ("npy", "raw", "zarr", "hdf5")
_SUFFIXES = {
    ".npy": "npy",
    ".zarr": "zarr",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".he5": "hdf5",
    ".nc": "hdf5",
    ".raw": "raw",
    ".bin": "raw",
    ".dat": "raw",
}
#: Chunks of new files, in bytes of elements.
_ZARR_CHUNK, _HDF5_CHUNK = 16 << 20, 1 << 20


class FileArray(Protocol):
    """An array in a file. `chunks`: the boxes in which it lies there; None if the elements just follow each other."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: str
    chunks: tuple[int, ...] | None

    def read(self, box: Box) -> npt.NDArray[Any]:
        """The elements in a box."""


@dataclass(frozen=True, slots=True)
class RawLayout:
    """What a raw file does not say itself. One length of the shape may be -1: what the file has."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...] | None = None
    order: str = "C"
    offset: int = 0


def format_of(path: str, given: str | None, default: str | None = None) -> str:
    """The format that a path's suffix tells, unless it is given."""
    if given is not None:
        return given
    file, _ = _split(path)
    suffix = os.path.splitext(file.rstrip("/"))[1].lower()
    found = _SUFFIXES.get(suffix) or ("zarr" if ".zarr/" in path else default)
    if found is None:
        raise click.UsageError(f"{path!r} does not tell its format: give it by --format, one of {', '.join(FORMATS)}")
    return found


def _split(path: str) -> tuple[str, str]:
    """``file.h5:dataset`` -> file, dataset."""
    if os.path.exists(path):
        return path, ""
    file, colon, name = path.rpartition(":")
    return (file, name.strip("/")) if colon and file and "/" not in os.path.splitext(file)[1] else (path, "")


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise click.ClickException(
            f"this format needs the package {name}: pip install 'dask_zbig[{extra}]' ({error})"
        ) from error


@contextlib.contextmanager
def _understanding(path: str) -> Iterator[None]:
    """Name the file in what a format's library says."""
    try:
        yield
    except ZBigError:
        raise
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise click.ClickException(f"{path}: {text}") from error
    except OSError as error:
        if error.filename is not None and error.strerror:
            raise
        raise click.ClickException(f"{path}: {error}") from error


@contextlib.contextmanager
def _making(path: str) -> Iterator[None]:
    """Name a new file as the user does: not the one that it is until it is whole."""
    try:
        yield
    except ZBigError:  # of the array
        raise
    except OSError as error:
        raise click.ClickException(f"{path}: {os.strerror(error.errno) if error.errno else error}") from error
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise click.ClickException(f"{path}: {error}") from error


# -- reading


@contextlib.contextmanager
def reading(path: str, form: str, layout: RawLayout | None = None) -> Iterator[FileArray]:
    """The array in a file that exists."""
    file, name = _split(path) if form in ("zarr", "hdf5") else (path, "")
    if not os.path.exists(file):
        raise click.ClickException(f"{file}: there is no such file")
    with contextlib.ExitStack() as stack:
        with _understanding(path):
            found: FileArray
            if form == "npy":
                found = stack.enter_context(contextlib.closing(_open_npy(path)))
            elif form == "raw":
                assert layout is not None
                found = stack.enter_context(contextlib.closing(_open_raw(path, layout)))
            elif form == "zarr":
                zarr = _library("zarr", "zarr")
                found = ChunkedFile(zarr.open_array(os.path.join(file, name) if name else file, mode="r"), path)
            else:
                opened = stack.enter_context(_library("h5py", "hdf5").File(file, "r"))
                found = ChunkedFile(opened[name or _only_dataset(opened)], path)
        yield found


def _open_npy(path: str) -> FlatFile:
    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("this is no .npy file")
    try:
        seen: Any = np.load(path, mmap_mode="r")
        offset = seen.offset
    except ValueError:
        seen = np.load(path)  # (an empty array cannot be mapped)
        if seen.size:
            raise
        offset = os.path.getsize(path)
    order = "F" if seen.flags.f_contiguous and not seen.flags.c_contiguous else "C"
    return FlatFile(path, seen.shape, seen.dtype, order, offset)


def _open_raw(path: str, layout: RawLayout) -> FlatFile:
    there = os.path.getsize(path) - layout.offset
    item = layout.dtype.itemsize
    shape = layout.shape if layout.shape is not None else (-1,)
    if any(n < -1 for n in shape) or shape.count(-1) > 1:
        raise ValueError(f"the shape {shape} has more than one unknown length")
    if -1 in shape:
        known = math.prod(n for n in shape if n != -1) * item
        rest, left = divmod(there, known) if known else (0, 0)
        if left:
            raise ValueError(f"{there} bytes are no whole number of {known} bytes")
        shape = tuple(rest if n == -1 else n for n in shape)
    need = math.prod(shape) * item
    if there < need:
        raise ValueError(f"it has {there} bytes where the shape {shape} needs {need}")
    return FlatFile(path, shape, layout.dtype, layout.order, layout.offset)


def _only_dataset(file: Any) -> str:
    """Of an HDF5 file."""
    names: list[str] = []
    h5py = _library("h5py", "hdf5")
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    if len(names) != 1:
        some = ", ".join(names[:8]) or "none"
        raise ValueError(f"it has {len(names)} datasets ({some}): say which, FILE:DATASET")
    return names[0]


class FlatFile:
    """Elements one after the other, without gaps, from some byte of a file on."""

    chunks: tuple[int, ...] | None = None

    def __init__(
        self, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], order: str, offset: int, *, write: str = ""
    ) -> None:
        """`write`: the name of a file that is made, in what is told of it."""
        self.shape, self.dtype, self.order = tuple(shape), dtype, order
        self._path, self._offset, self._name = path, offset, write or path
        self._file = open(path, "r+b" if write else "rb", buffering=0)  # noqa: SIM115 - closed by `close`

    def read(self, box: Box) -> npt.NDArray[Any]:
        where = locate(box, self.shape, self.dtype.itemsize, self.order)
        if where.hi - where.lo != math.prod(where.shape) * self.dtype.itemsize:
            whole = np.memmap(self._path, self.dtype, "r", self._offset, self.shape, self.order)  # type: ignore[call-overload]
            return np.array(whole[box])
        flat = np.empty(where.hi - where.lo, np.uint8)
        self._file.seek(self._offset + where.lo)
        done = 0
        while done < len(flat):
            size = self._file.readinto(flat.data[done:])
            if not size:
                raise click.ClickException(f"{self._path}: it has become shorter while it was read")
            done += size
        return flat.view(self.dtype).reshape(where.shape, order="F" if self.order == "F" else "C")

    def write_bytes(self, position: int, data: npt.NDArray[np.uint8]) -> None:
        """Put some bytes, in the order of memory. What is never written is zeros."""
        with _making(self._name):
            self._file.seek(self._offset + position)
            done = 0
            while done < len(data):
                done += self._file.write(data.data[done:])

    def sync(self) -> None:
        with _making(self._name):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ChunkedFile:
    """An array of Zarr or HDF5."""

    order = "C"
    #: Whether of a new one all is zeros that is never written.
    sparse = True

    def __init__(self, array: Any, name: str, check: Callable[[], None] = lambda: None) -> None:
        """`check`: called after each write, to raise what the library was not told."""
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ValueError(f"this is no array, but a {type(array).__name__}")
        if array.shape is None:
            raise ValueError("it is empty: it has no shape")
        self._array, self._name, self._check = array, name, check
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)
        self.chunks = tuple(array.chunks) if self.shape and getattr(array, "chunks", None) else None

    def read(self, box: Box) -> npt.NDArray[Any]:
        with _understanding(self._name):
            return np.asarray(self._array[box])

    def write(self, box: Box, part: npt.NDArray[Any]) -> None:
        """Put the elements in a box."""
        with _making(self._name), _typing(self.dtype):
            self._array[box] = part
            self._check()


class _Unfailing:
    """A new file for the HDF5 library, which crashes the process if a write fails, at the latest when that ends.

    So it is told that all is well, and `check` raises what was not.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "x+b", buffering=0)  # noqa: SIM115 - closed by `close`
        self._error: OSError | None = None
        self.seek, self.tell, self.close = self._file.seek, self._file.tell, self._file.close
        self.read = self._file.read

    def readinto(self, data: memoryview) -> int | None:
        return self._file.readinto(data)

    def write(self, data: memoryview) -> int:
        done = 0
        try:
            while self._error is None and done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            self._error = error
        return len(data)

    def truncate(self, size: int) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = error
            return size

    def flush(self) -> None:
        """There is nothing to flush; `check` when it is whole."""

    def sync(self) -> None:
        self.check()
        os.fsync(self._file.fileno())

    def check(self) -> None:
        if self._error is not None:
            raise self._error


# -- writing


@contextlib.contextmanager
def creating(
    path: str,
    form: str,
    like: Any,
    *,
    chunks: tuple[int, ...] | None = None,
    overwrite: bool = False,
) -> Iterator[FlatFile | ChunkedFile]:
    """A new array in a file, of the shape, dtype and order of `like`.

    It appears, or takes the place of what was there, when the block ends without an error; in an HDF5 file that exists
    already it is written in place.
    """
    file, name = _split(path) if form in ("zarr", "hdf5") else (path, "")
    target = os.path.join(file, name) if form == "zarr" and name else file
    inside = form == "hdf5" and os.path.exists(file)
    if os.path.lexists(target) and not inside and not overwrite:
        raise click.ClickException(f"{target} exists already: use --overwrite to replace it")
    folder = os.path.dirname(os.path.abspath(target))
    zarr_format = 3 if like.dtype.kind in "biufc" and like.dtype.isnative else 2  # which says how others are stored
    if form == "zarr" and name:
        with _understanding(path):
            zarr_format = _library("zarr", "zarr").open_group(file, mode="a").metadata.zarr_format
        os.makedirs(folder, exist_ok=True)
    if not os.path.isdir(folder):
        raise click.ClickException(f"{folder} is no directory")
    if inside:
        with _more_hdf5(file, name, like, chunks, overwrite) as made:
            yield made
        return
    with contextlib.ExitStack() as stack:
        with _making(folder):
            scratch = tempfile.mkdtemp(prefix=".zbig-export-", dir=folder)
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        new = os.path.join(scratch, os.path.basename(target.rstrip("/")) or "new")
        if form in ("npy", "raw"):
            with _making(target):
                flat = stack.enter_context(contextlib.closing(_new_flat(new, form, like, target)))
            yield flat
            flat.sync()
        elif form == "zarr":
            with _making(path):
                made_zarr = _new_zarr(new, like, chunks, zarr_format, path)
            yield made_zarr
        else:
            with _new_hdf5(new, name or "data", like, chunks, path) as made:
                yield made
        with _making(target):
            _replace(new, target, scratch)


def _replace(new: str, target: str, scratch: str) -> None:
    if os.path.isdir(target):
        os.rename(target, os.path.join(scratch, "old"))
    _set_usual_mode(new)
    os.rename(new, target)
    folder = os.open(os.path.dirname(os.path.abspath(target)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _set_usual_mode(path: str) -> None:
    """What any new file of the user gets."""
    mask = os.umask(0o077)
    os.umask(mask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~mask)


def _new_flat(path: str, form: str, like: Any, name: str) -> FlatFile:
    order = like.order if like.ndim > 1 else "C"
    if form == "raw" or not like.nbytes:
        offset = 0
        with open(path, "wb") as file:
            if form == "npy":
                np.save(file, np.empty(like.shape, like.dtype))
            else:
                file.truncate(like.nbytes)
    else:
        # it writes the header, of whatever version, and makes a file of this size that is all hole
        offset = np.lib.format.open_memmap(path, "w+", like.dtype, like.shape, order == "F").offset
    return FlatFile(path, like.shape, like.dtype, order, offset, write=name)


def _auto(like: Any, size: int) -> tuple[int, ...]:
    """Chunks as Dask would choose them."""
    return tuple(max(c[0], 1) for c in normalize_chunks("auto", like.shape, limit=size, dtype=like.dtype))


def _checked(chunks: tuple[int, ...] | None, like: Any) -> tuple[int, ...] | None:
    if chunks is not None and (len(chunks) != like.ndim or min(chunks) < 1):
        raise click.ClickException(f"{','.join(map(str, chunks))} are no chunks of an array of shape {like.shape}")
    return chunks


def _new_zarr(path: str, like: Any, chunks: tuple[int, ...] | None, zarr_format: int, name: str) -> ChunkedFile:
    zarr = _library("zarr", "zarr")
    with _typing(like.dtype):
        array = zarr.open_array(
            path,
            mode="w",
            shape=like.shape,
            chunks=_checked(chunks, like) or _auto(like, _ZARR_CHUNK),
            dtype=like.dtype,
            fill_value=np.zeros((), like.dtype)[()],
            zarr_format=zarr_format,
        )
    made = ChunkedFile(array, name)
    if like.nbytes:  # Zarr has its own mind of what fills structured elements: "0" in texts, say
        made.sparse = not any(np.asarray(array[(slice(0, 1),) * like.ndim]).tobytes())
    return made


@contextlib.contextmanager
def _typing(dtype: np.dtype[Any]) -> Iterator[None]:
    """Say of a dtype that a format's library refuses what can be done."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise TypeError(f"this format cannot hold the dtype {dtype}; .npy and raw files can ({error})") from error


@contextlib.contextmanager
def _new_hdf5(path: str, name: str, like: Any, chunks: tuple[int, ...] | None, told: str) -> Iterator[ChunkedFile]:
    """In a file of its own."""
    h5py = _library("h5py", "hdf5")
    with _making(told):
        file = _Unfailing(path)
    with contextlib.closing(file):
        with h5py.File(file, "w") as opened:
            with _making(told):
                made = _dataset(opened, name, like, chunks, told, file.check)
            yield made
        with _making(told):
            file.sync()


@contextlib.contextmanager
def _more_hdf5(
    file: str, name: str, like: Any, chunks: tuple[int, ...] | None, overwrite: bool
) -> Iterator[ChunkedFile]:
    """In a file that exists."""
    if not name:
        raise click.ClickException(f"{file} exists already: say which dataset of it shall be made, {file}:DATASET")
    space, need = shutil.disk_usage(file).free, like.info(exact=True).stored
    if space < need:  # (where the library itself finds out it crashes, as of a new file)
        raise click.ClickException(f"{file}: {need:,} bytes are needed, and {space:,} are free on its disk")
    with _making(file), _library("h5py", "hdf5").File(file, "a") as opened:
        if name in opened:
            if not overwrite:
                raise click.ClickException(f"{file} has a dataset {name!r} already: use --overwrite to replace it")
            del opened[name]
        made = _dataset(opened, name, like, chunks, file)
        try:
            yield made
        except BaseException:
            del opened[name]
            raise
        opened.flush()


def _dataset(
    opened: Any,
    name: str,
    like: Any,
    chunks: tuple[int, ...] | None,
    told: str,
    check: Callable[[], None] = lambda: None,
) -> ChunkedFile:
    cut = (_checked(chunks, like) or _auto(like, _HDF5_CHUNK)) if like.nbytes and like.shape else None
    with _typing(like.dtype):
        return ChunkedFile(opened.create_dataset(name, like.shape, like.dtype, chunks=cut), told, check)
