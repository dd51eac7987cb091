"""From a basic index to byte geometry. Pure: no array is touched.

Positions are computed with Python's integers: an array may be larger than the address space, where no ndarray
could stand in for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_zbig.errors import IndexingError, ShapeError

__all__ = ["Geometry", "bounds", "is_basic", "locate", "strides_of"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """A strided view of a file's bytes.

    `position` is that of its element (0, ..., 0); [lo, hi) are the bytes it spans, lo == hi if it is empty.
    """

    position: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    lo: int
    hi: int


def strides_of(shape: Sequence[int], itemsize: int, order: str) -> tuple[int, ...]:
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
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is None
        or part is Ellipsis
        or isinstance(part, slice)
        or (
            hasattr(part, "__index__")
            and not isinstance(part, (bool, np.bool_))
            and np.ndim(part) == 0
            and not isinstance(part, np.ndarray)
        )
        for part in parts
    )


def locate(index: Any, shape: tuple[int, ...], itemsize: int, order: str) -> Geometry:
    """Where the elements that a basic `index` selects lie.

    Raises
    ------
    IndexingError
        For what NumPy refuses: out of bounds, too many indices.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(1 for p in parts if p is not None and p is not Ellipsis)
    if consumed > len(shape):
        raise IndexingError(
            f"too many indices for array: array is {len(shape)}-dimensional, but {consumed} were indexed"
        )
    dots = [i for i, p in enumerate(parts) if p is Ellipsis]
    if len(dots) > 1:
        raise IndexingError("an index can only have a single ellipsis ('...')")
    at = dots[0] if dots else len(parts)
    parts[at : at + len(dots)] = [slice(None)] * (len(shape) - consumed)
    if 0 not in shape and math.prod(shape) * itemsize >= 1 << 63:
        raise ShapeError(f"an array of shape {shape} and itemsize {itemsize} exceeds 2^63 bytes")

    own = strides_of(shape, itemsize, order)
    position, axis = 0, 0
    out_shape: list[int] = []
    out_strides: list[int] = []
    for part in parts:
        if part is None:
            out_shape.append(1)
            out_strides.append(0)
            continue
        n, step = shape[axis], own[axis]
        if isinstance(part, slice):
            start, stop, stride = part.indices(n)
            length = len(range(start, stop, stride))
            position += start * step if length else 0
            out_shape.append(length)
            out_strides.append(step * stride)
        else:
            i = part.__index__()
            if not -n <= i < n:
                raise IndexingError(f"index {i} is out of bounds for axis {axis} with size {n}")
            position += (i % n) * step
        axis += 1
    lo, hi = bounds(position, out_shape, out_strides, itemsize)
    return Geometry(position, tuple(out_shape), tuple(out_strides), lo, hi)
