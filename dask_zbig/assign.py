"""Direct assignment: a large contiguous region is written to scratch as a file is, not through its view.

Storing into a view takes a fault for each block of it, and a clean block's old bytes are copied before they are
overwritten. Where all bytes of a region are given at once neither is needed, nor need the old bytes be there at all.
"""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.ahead import ALL, SOME
from dask_zbig.memory._native import BLOCK, PAGE, check
from dask_zbig.memory.space import Window
from dask_zbig.openfile import OpenFile

__all__ = ["DIRECT", "assign"]

#: Below this many bytes the ordinary assignment to a view is cheaper.
DIRECT = 64 << 10
#: What is written at once from memory that needs no conversion.
AT_ONCE = 32 * BLOCK


def assign(
    opened: OpenFile,
    lo: int,
    hi: int,
    position: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    strides: tuple[int, ...],
    values: Any,
) -> None:
    """What ``view[...] = values`` does, for the view of `opened` with this geometry, by whichever way is the cheaper.

    Parameters
    ----------
    lo, hi, position, shape, dtype, strides
        As of `OpenFile.view`: the view spans the bytes [lo, hi). None, if these are equal.
    values
        Anything that NumPy can assign to such a view. It may overlap it.

    Raises
    ------
    ScratchError
        At once, unlike that of a store into a view. As there, part of the region has changed, and the transaction can
        only be aborted, or rolled back to a savepoint: half an assignment is never committed by mistake.
    ClosedError
        If the connection is closed.
    ValueError
        If the array cannot be changed here, and whatever else NumPy raises for such `values`.

    Notes
    -----
    Called from the connection's thread. Other threads may use views of the region meanwhile; they see each byte before
    or after the change. What they change in `values` meanwhile may be assigned or not.
    """
    axes = _memory_order(hi - lo, shape, dtype, strides)
    window = _window(opened, lo, hi) if axes is not None else None
    source = _as_array(values, shape, dtype) if window is not None else None
    if axes is None or window is None or source is None:
        view = opened.view(lo, hi, position, shape, dtype, strides, SOME) if lo < hi else np.empty(shape, dtype)
        view.__setitem__(..., values)  # (a call: what happened in it is raised at its end)
        return
    source = np.atleast_1d(source[tuple(slice(None, None, -1 if s < 0 else 1) for s in strides)].transpose(axes))
    at = _place(opened, source)
    if at is None or at[1] <= lo or at[0] >= hi:
        _Assignment(opened, window, lo, hi, _Bytes(source, dtype)).run()
    elif not _is_straight(source, dtype):
        _Assignment(opened, window, lo, hi, _Bytes(_copied(source, dtype), dtype)).run()
    elif at[0] != lo:
        _Assignment(opened, window, lo, hi, _Bytes(source, dtype)).move(backwards=at[0] < lo)
    else:
        return  # `A[i:j] += 1` ends like this: all is there already
    opened.wrote(lo, hi)


# -- what is assigned


def _memory_order(
    size: int, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...]
) -> list[int] | None:
    """The axes in the order in which the elements lie, without gaps; None if there are gaps, or few bytes."""
    if size < DIRECT or size != math.prod(shape) * dtype.itemsize:
        return None
    axes = sorted(range(len(shape)), key=lambda i: -abs(strides[i]))
    step = dtype.itemsize
    for i in reversed(axes):
        if shape[i] > 1 and abs(strides[i]) != step:
            return None
        step *= shape[i]
    return axes


def _as_array(values: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
    """The values as an ndarray of this shape, of whatever dtype; None where NumPy's assignment knows better."""
    like = isinstance(values, np.ndarray) or hasattr(values, "__array__")
    if not like and dtype.kind not in "biufcmM":
        return None
    try:
        # Of Python's numbers, and sequences of them, each must fit the dtype; of an array's that is not asked.
        source = np.asarray(values) if like else np.asarray(values, dtype)
        while like and source.ndim > len(shape) and source.shape[0] == 1:
            source = source[0]
        return np.broadcast_to(source, shape)
    except (TypeError, ValueError, OverflowError):
        return None  # it will say the same in its own words


def _is_straight(source: npt.NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Whether the bytes in memory are the bytes to be written."""
    return source.dtype == dtype and source.flags.c_contiguous


def _copied(source: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A copy, of what is there once only once."""
    once = source[tuple(slice(0, 1) if s == 0 else slice(None) for s in source.strides)]
    copy = np.empty(once.shape, dtype)
    copy[...] = once
    return np.broadcast_to(copy, source.shape)


def _boxes(shape: Sequence[int], lo: int, hi: int) -> Iterator[tuple[int | slice, ...]]:
    """Cut the elements [lo, hi), counted in C order, of an array of this shape into basic indices, in this order."""
    if len(shape) == 1:
        yield (slice(lo, hi),)
        return
    row = math.prod(shape[1:])
    first, last = -(-lo // row), hi // row  # whole rows
    if first > last:  # both in the middle of row `last`
        yield from ((last, *box) for box in _boxes(shape[1:], lo - last * row, hi - last * row))
        return
    if lo < first * row:
        yield from ((first - 1, *box) for box in _boxes(shape[1:], lo - (first - 1) * row, row))
    if first < last:
        yield (slice(first, last),)
    if last * row < hi:
        yield from ((last, *box) for box in _boxes(shape[1:], 0, hi - last * row))


class _Bytes:
    """The bytes to be written, in pieces; what is converted or copied is good until the next piece is asked for."""

    def __init__(self, source: npt.NDArray[Any], dtype: np.dtype[Any]) -> None:
        self._source = source
        self._dtype = dtype
        self._buffer: npt.NDArray[Any] | None = None
        self.straight: npt.NDArray[np.uint8] | None = None
        if _is_straight(source, dtype):
            self.straight = source.reshape(-1).view(np.uint8)
        self._constant = all(s == 0 or n == 1 for n, s in zip(source.shape, source.strides, strict=True))

    def get(self, lo: int, hi: int) -> npt.NDArray[np.uint8]:
        """Bytes [lo, hi), wherever they are; not more than a block, if they are not `straight`."""
        return self.straight[lo:hi] if self.straight is not None else self.fetch(lo, hi)

    def fetch(self, lo: int, hi: int) -> npt.NDArray[np.uint8]:
        """The same, in memory of our own, which is always there."""
        size = self._dtype.itemsize
        if self._buffer is None:  # as large as a block with parts of elements on both sides of it
            self._buffer = np.empty(min(self._source.size, BLOCK // size + 2), self._dtype)
            if self._constant:
                self._buffer[...] = self._source[(0,) * self._source.ndim]
        first, stop = lo // size, -(-hi // size)
        if not self._constant:
            at = 0
            for box in _boxes(self._source.shape, first, stop):
                part = self._source[box]
                self._buffer[at : at + part.size].reshape(part.shape)[...] = part
                at += part.size
        return self._buffer.view(np.uint8)[lo - first * size : hi - first * size]


# -- where it goes


def _window(opened: OpenFile, lo: int, hi: int) -> Window | None:
    """The window to write by; None if a change must know what it changes, see `OpenFile.boundary`."""
    with opened.turn:
        opened.enter()
        if not opened.writeable:
            raise ValueError("assignment destination is read-only")
        if opened.manager is not None and not opened.manager.joined:
            return None
        return opened.mapping.window(lo, hi, opened.owner.nbytes)


def _place(opened: OpenFile, source: npt.NDArray[Any]) -> tuple[int, int] | None:
    """The bytes of the file that the source's memory shows, by whatever window; None if it is other memory."""
    start, stop = np.lib.array_utils.byte_bounds(source)
    for window in opened.space.windows():
        first, last = window.address, window.address + window.length
        if start < last and stop > first:
            return start - first + window.start, stop - first + window.start
    return None


def _whole_pages(lo: int, hi: int) -> tuple[int, int]:
    """Where the first and the last whole page of [lo, hi) begins and ends; both are `hi` if there is none."""
    first = min(-(-lo // PAGE) * PAGE, hi)
    return first, max(first, hi // PAGE * PAGE)


def _pieces(lo: int, hi: int) -> list[tuple[int, int]]:
    """Cut [lo, hi) at the block boundaries, and what is no whole page from what is."""
    ordered = sorted({lo, hi, *_whole_pages(lo, hi), *range(-(-lo // BLOCK) * BLOCK, hi, BLOCK)})
    return list(itertools.pairwise(ordered))


class _Assignment:
    """Bytes on their way to [lo, hi) of a file."""

    def __init__(self, opened: OpenFile, window: Window, lo: int, hi: int, source: _Bytes) -> None:
        self._opened = opened
        self._window = window
        self._lo, self._hi = lo, hi
        self._source = source

    def run(self) -> None:
        """From first to last; the source lies elsewhere."""
        lo, hi = self._lo, self._hi
        if self._source.straight is None:
            for a, b in _pieces(lo, hi):
                self._put(a, b, self._source.get(a - lo, b - lo))
            return
        first, last = _whole_pages(lo, hi)
        if lo < first:
            self._put(lo, first, self._source.get(0, first - lo))
        for a in range(first, last, AT_ONCE):
            self._put_straight(a, min(a + AT_ONCE, last))
        if last < hi:
            self._put(last, hi, self._source.get(last - lo, hi - lo))

    def move(self, *, backwards: bool) -> None:
        """The source overlaps: no byte of it may be overwritten before it was read."""
        pieces = _pieces(self._lo, self._hi)
        for a, b in reversed(pieces) if backwards else pieces:
            self._put(a, b, self._source.fetch(a - self._lo, b - self._lo))

    def _put_straight(self, lo: int, hi: int) -> None:
        """Whole pages, from the source's own memory, as far as that is there."""
        if self._write(lo, self._source.get(lo - self._lo, hi - self._lo)):
            return
        for a, b in _pieces(lo, hi):
            if not self._write(a, self._source.get(a - self._lo, b - self._lo)):
                self._write(a, self._source.fetch(a - self._lo, b - self._lo))

    def _put(self, lo: int, hi: int, data: npt.NDArray[np.uint8]) -> None:
        if lo % PAGE or hi % PAGE:
            self._opened.view(lo, hi, lo, (hi - lo,), data.dtype, (1,), ALL).__setitem__(..., data)
        elif not self._write(lo, data):
            self._write(lo, self._source.fetch(lo - self._lo, hi - self._lo))

    def _write(self, lo: int, data: npt.NDArray[np.uint8]) -> bool:
        """Write whole pages; False if the data must be loaded first: the kernel does not wait for that."""
        result = self._window.write(lo, data, len(data))
        if result == -errno.EFAULT:
            return False
        if result < 0 and result != -errno.ENOTCONN:
            self._opened.space.fail(-result)
        check(result, f"write {len(data)} bytes of a change to a scratch file")
        return True
