"""From a basic index to byte geometry. Pure: no array is touched.

Positions are computed with Python's integers: an array may be larger than the address space, where no ndarray
could stand in for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_zbig.distinct import distinct
from dask_zbig.errors import IndexingError, ShapeError

__all__ = ["Geometry", "bounds", "is_basic", "locate", "major_rows", "strides_of"]


_PLAIN = frozenset({int, slice, type(None), type(Ellipsis)})


class Geometry(NamedTuple):
    """A strided view of a file's bytes.

    `position` is that of its element (0, ..., 0); [lo, hi) are the bytes it spans, lo == hi if it is empty.
    """

    position: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    lo: int
    hi: int


@lru_cache
def strides_of(shape: tuple[int, ...], itemsize: int, order: str) -> tuple[int, ...]:
    """Strides in bytes of a gapless array. Zero-length axes count as one, as in NumPy."""
    axes = list(shape) if order == "F" else list(reversed(shape))
    out, step = [], itemsize
    for n in axes:
        out.append(step)
        step *= max(n, 1)
    return tuple(out) if order == "F" else tuple(reversed(out))


def bounds(position: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """The bytes [lo, hi) that a strided view spans."""
    if 0 in shape:
        return position, position
    lo = position + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0)
    hi = position + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s > 0) + itemsize
    return lo, hi


def is_basic(index: Any) -> bool:
    """Whether `index` selects a view: only integers, slices, Ellipsis and newaxis."""
    for part in index if isinstance(index, tuple) else (index,):
        if part.__class__ in _PLAIN:
            continue
        if not (
            isinstance(part, slice)
            or (
                hasattr(part, "__index__") and not isinstance(part, (bool, np.bool_, np.ndarray)) and np.ndim(part) == 0
            )
        ):
            return False
    return True


def locate(index: Any, shape: tuple[int, ...], itemsize: int, order: str) -> Geometry:
    """Where the elements that a basic `index` selects lie.

    Raises
    ------
    IndexingError
        For what NumPy refuses: out of bounds, too many indices.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = len(parts)
    dots = -1
    for k, part in enumerate(parts):
        if part is None:
            consumed -= 1
        elif part is Ellipsis:
            consumed -= 1
            if dots >= 0:
                raise IndexingError("an index can only have a single ellipsis ('...')")
            dots = k
    missing = len(shape) - consumed
    if missing < 0:
        raise IndexingError(
            f"too many indices for array: array is {len(shape)}-dimensional, but {consumed} were indexed"
        )
    if dots >= 0:
        parts[dots : dots + 1] = [_ALL] * missing
    elif missing:
        parts += [_ALL] * missing
    own = _checked_strides(shape, itemsize, order)
    position, axis = 0, 0
    lo = hi = 0  # from there
    empty = False
    out_shape: list[int] = []
    out_strides: list[int] = []
    for part in parts:
        if part is None:
            out_shape.append(1)
            out_strides.append(0)
            continue
        n, step = shape[axis], own[axis]
        axis += 1
        if isinstance(part, slice):
            start, stop, stride = part.indices(n)
            length = len(range(start, stop, stride))
            step *= stride
            if length:
                position += start * own[axis - 1]
                if step < 0:
                    lo += (length - 1) * step
                else:
                    hi += (length - 1) * step
            else:
                empty = True
            out_shape.append(length)
            out_strides.append(step)
        else:
            i = part.__index__()
            if not -n <= i < n:
                raise IndexingError(f"index {i} is out of bounds for axis {axis - 1} with size {n}")
            position += (i % n) * step
    if empty:
        return Geometry(position, tuple(out_shape), tuple(out_strides), position, position)
    return Geometry(position, tuple(out_shape), tuple(out_strides), position + lo, position + hi + itemsize)


_ALL = slice(None)


@lru_cache
def _checked_strides(shape: tuple[int, ...], itemsize: int, order: str) -> tuple[int, ...]:
    if 0 not in shape and math.prod(shape) * itemsize >= 1 << 63:
        raise ShapeError(f"an array of shape {shape} and itemsize {itemsize} exceeds 2^63 bytes")
    return strides_of(shape, itemsize, order)


#: Of more separate runs of rows `major_rows` does not tell.
_RUNS = 4096


def major_rows(index: Any, shape: Sequence[int]) -> npt.NDArray[np.int64] | None:
    """The indices on the first axis that an advanced `index` may select, as ranges; None: all, or too scattered.

    >>> major_rows([3, -1, 4], (10, 2)).tolist()
    [[3, 5], [9, 10]]
    >>> major_rows((slice(None), [1]), (10, 2)) is None
    True
    """
    first = (index[0] if index else Ellipsis) if isinstance(index, tuple) else index
    if not shape or not isinstance(first, (list, np.ndarray, int, np.integer)) or isinstance(first, bool):
        return None
    try:
        rows = np.asarray(first)
    except ValueError:
        return None  # NumPy will say what is wrong with it
    if rows.dtype == bool:
        if rows.ndim == 0 or rows.shape != tuple(shape[: rows.ndim]):
            return None
        rows = np.flatnonzero(rows.any(axis=tuple(range(1, rows.ndim))))
    elif rows.dtype.kind not in "iu" or (rows.size and not -shape[0] <= rows.min() <= rows.max() < shape[0]):
        return None
    rows = distinct(np.where(rows < 0, rows + shape[0], rows).ravel()).astype(np.int64)
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    if len(starts) > _RUNS:
        return None
    stops = np.append(starts[1:], len(rows)) if len(starts) else starts
    return np.stack([rows[starts], rows[stops - 1] + 1], 1)
