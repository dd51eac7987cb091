"""What every array of ours has: a shape that can change, a dtype, an order, and `append`."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dask_zbig.ahead import ALL
from dask_zbig.array.arraylike import NDArrayLike
from dask_zbig.array.display import Displayed
from dask_zbig.array.indexing import strides_of
from dask_zbig.errors import DTypeError, ShapeError

__all__ = ["MAX_AXES", "Casting", "ResizableArray", "checked_dtype", "checked_shape"]

MAX_BYTES = 1 << 63
MAX_AXES = 64

Casting = Literal["no", "equiv", "safe", "same_kind", "unsafe"]


class ResizableArray(Displayed, NDArrayLike):
    """A mixin for classes that keep `_shape`, `_dtype` and `_order`, and have `resize`."""

    if TYPE_CHECKING:
        _shape: tuple[int, ...]
        _dtype: np.dtype[Any]
        _order: str

        def resize(self, *shape: Any) -> None: ...

    def _begin(self, shape: int | Sequence[int], dtype: npt.DTypeLike, order: str) -> None:
        """Take the arguments of `__init__`. Raises DTypeError, ShapeError."""
        self._dtype, inner = checked_dtype(dtype)
        self._shape = checked_shape(shape, self._dtype.itemsize, inner)
        if order not in ("C", "F"):
            raise ShapeError(f"order must be 'C' or 'F', not {order!r}")
        self._order = order

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Elements along each axis. Change it by `resize`."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        """The elements' type."""
        return self._dtype

    @property
    def order(self) -> str:
        """ "C" or "F"."""
        return self._order

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes to step along each axis."""
        return strides_of(self._shape, self._dtype.itemsize, self._order)

    @property
    def major_axis(self) -> int:
        """The axis that `append` extends: 0 in C order, the last in F order."""
        return 0 if self._order == "C" else len(self._shape) - 1

    def _asked_shape(self, arguments: tuple[Any, ...]) -> tuple[int, ...]:
        """The shape that the arguments of `resize` ask for: none for no other, as in NumPy, and not for ``()``."""
        if not arguments:
            return self._shape
        return checked_shape(arguments[0] if len(arguments) == 1 else arguments, self.itemsize)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} shape={self.shape} dtype={self.dtype} order={self.order!r}>"

    def append(self, values: npt.ArrayLike, casting: Casting = "same_kind") -> None:
        """Add elements at the end of the major axis, at a cost in proportion to them.

        Parameters
        ----------
        values : array_like
            Of this array's shape but for the major axis, where it may have any length, also none.
        casting : {"no", "equiv", "safe", "same_kind", "unsafe"}
            What `values` may be cast by, as in `numpy.can_cast`.

        Raises
        ------
        ShapeError
            If it has another shape. The array is as before.
        DTypeError
            If it cannot be cast to the array's dtype by this rule. The array is as before.

        Examples
        --------
        >>> import dask_zbig as dz
        >>> A = dz.RAMArray((0, 2), "f4")
        >>> A.append([[1, 2], [3, 4]])
        >>> A.shape
        (2, 2)
        """
        new = self._as_values(values)
        if not self._shape:
            raise ShapeError("cannot append to a 0-dimensional array")
        axis = self.major_axis
        rest = self._shape[:axis] + self._shape[axis + 1 :]
        if new.ndim != self.ndim or new.shape[:axis] + new.shape[axis + 1 :] != rest:
            raise ShapeError(f"cannot append values of shape {new.shape} along axis {axis} to {self!r}")
        if not np.can_cast(new.dtype, self._dtype, casting):
            raise DTypeError(f"cannot append {new.dtype} values to {self!r}: not castable by {casting!r}")
        before = self._shape
        at = before[axis]
        self.resize((*before[:axis], at + new.shape[axis], *before[axis + 1 :]))
        try:
            where: list[Any] = [slice(None)] * self.ndim
            where[axis] = slice(at, None)
            self[tuple(where)] = new
        except BaseException:
            self.resize(before)
            raise

    def _as_values(self, values: npt.ArrayLike) -> npt.NDArray[Any]:
        """`values` as an ndarray; integers that come as Python's take this array's dtype, if they fit."""
        if isinstance(values, NDArrayLike):
            values = values._values(ALL)
        new = np.asarray(values)
        if hasattr(values, "dtype") or new.dtype.kind not in "iu" or self._dtype.kind not in "iu":
            return new
        try:
            return np.asarray(values, self._dtype)
        except OverflowError as e:
            raise DTypeError(f"a value does not fit {self!r}: {e}") from e


def checked_dtype(dtype: npt.DTypeLike) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """A dtype, and the axes that it adds to a shape if it is a sub-array. Raises `DTypeError`."""
    try:
        checked = np.dtype(dtype)
    except TypeError as e:
        raise DTypeError(f"{dtype!r} is no dtype: {e}") from e
    inner: tuple[int, ...] = ()
    if checked.subdtype is not None:  # (of which the base is none)
        checked, inner = checked.subdtype
    if checked.kind == "T":
        raise DTypeError(f"dtype {checked} keeps its strings outside of the array; use 'U' or 'S' with a length")
    if checked.hasobject:
        raise DTypeError(
            f"dtype {checked} holds Python objects, whose pointers mean nothing on disk; "
            f"store such objects in ZODB itself"
        )
    if checked.itemsize == 0:
        raise DTypeError(f"dtype {checked} has elements of no bytes; give a length, such as 'S10'")
    checked = np.lib.format.drop_metadata(checked)
    try:
        np.lib.format.dtype_to_descr(checked)
    except ValueError as e:
        raise DTypeError(f"dtype {checked} cannot be described to the database: {e}") from e
    return checked, inner


def checked_shape(shape: Any, itemsize: int, inner: tuple[int, ...] = ()) -> tuple[int, ...]:
    """A shape, with the axes `inner` at its end. Raises `ShapeError`."""
    try:
        parts = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        checked = tuple(operator.index(n) for n in parts) + inner
    except TypeError as e:
        raise ShapeError(f"a shape is an int or a sequence of ints, not {shape!r}") from e
    if len(checked) > MAX_AXES:
        raise ShapeError(f"{len(checked)} axes are more than NumPy's {MAX_AXES}")
    if any(n < 0 for n in checked):
        raise ShapeError(f"negative length in shape {checked}")
    if math.prod(checked) * itemsize >= MAX_BYTES:
        raise ShapeError(f"shape {checked} with {itemsize} bytes an element exceeds 2^63 bytes")
    return checked
