"""Copying between a file and a stored array, in bounded memory, with a checksum; and comparing the two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import xxhash

from dask_zbig.array.indexing import Geometry, locate, strides_of
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cli.formats import Box, ChunkedFile, FileArray, FlatFile
from dask_zbig.storage.survey import stored_ranges

__all__ = ["AT_ONCE", "boxes", "checksum", "compare", "copy_in", "copy_out"]

#: Bytes that are copied at once; a chunk of a file is always copied whole.
AT_ONCE = 64 << 20
_ZEROS = bytes(1 << 20)
_GAP = 64 << 10


def boxes(
    shape: tuple[int, ...], itemsize: int, order: str, chunks: tuple[int, ...] | None, most: int = AT_ONCE
) -> Iterator[tuple[Box, int]]:
    """Cut an array into boxes of up to `most` bytes, or of a chunk if that is more, none of which cuts a chunk.

    Yields
    ------
    box, before
        Ordered by their first elements in memory, so that all bytes [0, before) of the array are in the boxes up to
        this one.
    """
    if 0 in shape:
        return
    axes = list(range(len(shape)))
    if order == "F":
        axes.reverse()
    unit = [min(c, n) for c, n in zip(chunks, shape, strict=True)] if chunks is not None else [1] * len(shape)
    step = list(unit)
    for axis in reversed(axes):  # from the axis along which memory is contiguous on
        rest = math.prod(step) // step[axis] * itemsize
        step[axis] = min(max(most // rest // unit[axis], 1) * unit[axis], shape[axis])
        if step[axis] < shape[axis]:
            break
    strides = strides_of(shape, itemsize, order)
    starts = itertools.product(*(range(0, shape[axis], step[axis]) for axis in axes))
    total = math.prod(shape) * itemsize

    def box(corner: tuple[int, ...]) -> tuple[Box, int]:
        at = dict(zip(axes, corner, strict=True))
        slices = tuple(slice(at[i], min(at[i] + step[i], n)) for i, n in enumerate(shape))
        return slices, sum(at[i] * s for i, s in enumerate(strides))

    one = next(starts, None)
    while one is not None:
        following = next(starts, None)
        yield box(one)[0], total if following is None else box(following)[1]
        one = following


class _Digest:
    """XXH3-128 of an array's bytes, in the order of memory, as `xxh128sum` has it."""

    def __init__(self, array: ZBigArray, *, committed: bool) -> None:
        self._array = array
        self._committed = committed  # then the extent map tells where there are only zeros
        self._plain = _without_gaps(array.dtype).itemsize == array.itemsize
        self._hash = xxhash.xxh3_128()
        self._done = 0

    def upto(self, position: int) -> None:
        """Take in all bytes before a position."""
        lo, hi = self._done, position
        if hi <= lo:
            return
        runs = stored_ranges(self._array._file, lo, hi) if self._committed else iter([(lo, hi)])
        for start, stop in runs:
            self._zeros(start - lo)
            for at in range(start, stop, AT_ONCE):
                self._hash.update(_bytes_of(self._array, at, min(at + AT_ONCE, stop)).data)
            lo = stop
        self._zeros(hi - lo)
        self._done = position

    def take(self, part: npt.NDArray[Any], before: int) -> bool:
        """Take in elements that the array has got just before a position, if they are what comes next.

        So the array's own memory need not be touched, which stays resident as long as it is changed.
        """
        if not self._plain or self._done + part.nbytes != before or part.dtype != self._array.dtype:
            return False
        flat = part.T if self._array.order == "F" else part
        if not flat.flags.c_contiguous:
            return False
        self._hash.update(flat.reshape(-1).view(np.uint8).data)
        self._done = before
        return True

    def _zeros(self, size: int) -> None:
        for at in range(0, size, len(_ZEROS)):
            self._hash.update(memoryview(_ZEROS)[: min(len(_ZEROS), size - at)])

    def text(self) -> str:
        return f"xxh128:{self._hash.hexdigest()}"


def _bytes_of(array: ZBigArray, lo: int, hi: int) -> npt.NDArray[np.uint8]:
    """Some of its memory, which is here."""
    array._open().prefetch(lo, hi)
    return array.view_at(Geometry(lo, (hi - lo,), (1,), lo, hi), np.dtype(np.uint8))


def _not_zero(part: npt.NDArray[Any]) -> bool:
    """Whether any byte is not 0: also of -0.0, say."""
    flat = (part.T if part.flags.f_contiguous else np.ascontiguousarray(part)).reshape(-1).view(np.uint8)
    return bool(flat[:4096].any() or flat.any())


def copy_in(
    source: FileArray, array: ZBigArray, told: Callable[[int], None], commit: Callable[[], None], every: int | None
) -> str:
    """From a file into a new array. Zeros are not stored. Returns the checksum of what the array has then.

    Parameters
    ----------
    told
        Called with the size of each part that is done.
    commit, every
        What is called after so many bytes; None: never.
    """
    digest = _Digest(array, committed=False)
    pending = 0
    for box, before in boxes(source.shape, source.dtype.itemsize, array.order, source.chunks):
        part = source.read(box)
        if _not_zero(part):
            array[box] = part
            pending += part.nbytes
        if not digest.take(part, before):
            digest.upto(before)
        told(part.nbytes)
        if every is not None and pending >= every:
            commit()
            pending = 0
    return digest.text()


def copy_out(array: ZBigArray, target: FlatFile | ChunkedFile, told: Callable[[int], None]) -> str:
    """From an array without uncommitted changes into a new file. Holes stay holes. Returns the checksum."""
    digest = _Digest(array, committed=True)
    item = array.itemsize
    for box, before in boxes(array.shape, item, array.order, target.chunks):
        where = locate(box, array.shape, item, array.order)
        stored = _joined(stored_ranges(array._file, where.lo, where.hi))
        if isinstance(target, FlatFile):  # which has the array's own bytes: only those that are stored are written
            for lo, hi in stored:
                target.write_bytes(lo, _bytes_of(array, lo, hi))
        elif not target.sparse or next(stored, None) is not None:
            array.prefetch(box)
            target.write(box, array[(*box, ...)])
        digest.upto(before)
        told(math.prod(where.shape) * item)
    return digest.text()


def _joined(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """With small gaps between them filled: it is not worth a call."""
    at = next(ranges, None)
    for lo, hi in ranges:
        assert at is not None
        if lo - at[1] > _GAP:
            yield at
            at = (lo, hi)
        else:
            at = (at[0], hi)
    if at is not None:
        yield at


def checksum(array: ZBigArray, told: Callable[[int], None] = lambda size: None) -> str:
    """Of a committed array."""
    digest = _Digest(array, committed=True)
    for lo in range(0, array.nbytes, AT_ONCE):
        hi = min(lo + AT_ONCE, array.nbytes)
        digest.upto(hi)
        told(hi - lo)
    return digest.text()


def compare(file: FileArray, array: ZBigArray, told: Callable[[int], None]) -> None:
    """Read both, and raise if any element is not the same, bit by bit."""
    packed = _without_gaps(array.dtype)
    for box, _ in boxes(array.shape, array.itemsize, array.order, file.chunks):
        told(_compare(file, array, box, packed))


def _compare(file: FileArray, array: ZBigArray, box: Box, packed: np.dtype[Any]) -> int:
    """One box. (A function, so that its view is gone before there is another: then pages are given back.)"""
    array.prefetch(box)
    theirs = np.ascontiguousarray(file.read(box).astype(array.dtype, copy=False).astype(packed, copy=False))
    ours = np.ascontiguousarray(array[(*box, ...)].astype(packed, copy=False))
    a, b = (x.reshape(-1).view(np.uint8).reshape(-1, packed.itemsize) for x in (theirs, ours))
    if not np.array_equal(a, b):
        wrong = np.flatnonzero((a != b).any(axis=1))
        inside = np.unravel_index(int(wrong[0]), ours.shape) if box else ()
        index = tuple(int(i) + s.start for i, s in zip(inside, box, strict=True))
        raise click.ClickException(
            f"the file and the array differ, in {len(wrong)} elements of the first box that does, "
            f"the first of them at {index}"
        )
    return ours.nbytes


def _without_gaps(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A structured dtype without padding, whose bytes mean nothing."""
    if dtype.names is None:
        return dtype
    from numpy.lib.recfunctions import repack_fields  # (imports much)

    return repack_fields(dtype, recurse=True)
