"""`ArrayRef`: a view of a stored array, as something that can be stored or sent."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.array.arraylike import NDArrayLike
from dask_zbig.array.indexing import Geometry, bounds
from dask_zbig.array.resizable import MAX_AXES, checked_dtype
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.errors import ShapeError, ViewError, ZBigError
from dask_zbig.memory.space import place_of
from dask_zbig.openfile import OpenFile
from dask_zbig.storage.format import VERSION, unpack_state

__all__ = ["ArrayRef"]


class ArrayRef:
    """A small reference to a view of a `ZBigArray`.

    It can be an attribute of persistent objects (ZODB stores the array once, and the reference with them), and
    can be pickled: then, in whatever process, it means the array as it was committed when that was done.

    Parameters
    ----------
    view : ndarray
        Any view of a ZBigArray: what slicing, transposing, reshaping, field access, ``view(dtype)`` make of it.

    Raises
    ------
    ViewError
        If it is a view of something else, or a copy.

    Notes
    -----
    Immutable, and so thread-safe. It refers to a place in memory order, which it keeps when the array is resized.

    Examples
    --------
    >>> import dask_zbig as dz, transaction, ZODB
    >>> db = ZODB.DB(None)
    >>> conn = db.open()
    >>> conn.root()["A"] = A = dz.ZBigArray((10, 10), "i4")
    >>> A[3] = range(10)
    >>> conn.root()["odd"] = dz.ArrayRef(A[3, 1::2])
    >>> transaction.commit()
    >>> conn.root()["odd"].deref().tolist()
    [1, 3, 5, 7, 9]
    >>> conn.close(); db.close()
    """

    def __init__(self, view: npt.NDArray[Any]) -> None:
        if not isinstance(view, np.ndarray):
            raise ViewError(f"expected a view of a ZBigArray, not {type(view).__name__}")
        found = place_of(view)
        service = found and found[0].service
        if not view.size:
            raise ViewError(f"an empty array, of shape {view.shape}, refers to nothing")
        if found is None or not isinstance(service, OpenFile) or not isinstance(service.owner, ZBigArray):
            raise ViewError("not a view of a ZBigArray, but an array in memory (a copy of one, perhaps)")
        self._set(service.owner, found[1], view.shape, view.strides, view.dtype)

    def _set(self, array: Any, position: Any, shape: Any, strides: Any, dtype: Any) -> None:
        try:
            self._array = array
            self._position = operator.index(position)
            self._shape = tuple(map(operator.index, shape))
            self._strides = tuple(map(operator.index, strides))
            self._dtype, inner = checked_dtype(dtype)
            if not isinstance(array, NDArrayLike):
                raise ViewError(f"{type(array).__name__} is no array of ours")
        except (TypeError, ZBigError) as e:
            raise ViewError(f"not a reference to a view: {e}") from e
        wrong = len(self._shape) != len(self._strides) or len(self._shape) > MAX_AXES or inner
        if wrong or any(n < 0 for n in self._shape):
            raise ViewError(f"no view has shape {shape}, strides {strides} and dtype {dtype}")

    def __getstate__(self) -> tuple[Any, ...]:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        return (VERSION, self._array, self._position, self._shape, self._strides, descr)

    def __setstate__(self, state: Any) -> None:
        array, position, shape, strides, descr = unpack_state(self, state, 5)
        try:
            dtype = np.lib.format.descr_to_dtype(descr)
        except (TypeError, ValueError) as e:
            raise ViewError(f"not a reference to a view: {descr!r} is no dtype: {e}") from e
        self._set(array, position, shape, strides, dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ArrayRef):
            return NotImplemented
        return self._array is other._array and self.__getstate__()[2:] == other.__getstate__()[2:]

    def __hash__(self) -> int:
        return hash((self._position, self._shape, self._strides))

    def __repr__(self) -> str:
        return f"<ArrayRef to shape={self._shape} dtype={self._dtype} at byte {self._position} of {self._array!r}>"

    @property
    def array(self) -> Any:
        """The array that the view is of: a `ZBigArray`; in another process, an `ArraySource`."""
        return self._array

    def deref(self) -> npt.NDArray[Any]:
        """The view, as the array is now in its connection.

        Raises
        ------
        ShapeError
            If it does not lie inside of the array (any more), because that has been made smaller.
        """
        lo, hi = bounds(self._position, self._shape, self._strides, self._dtype.itemsize)
        if not 0 <= lo <= hi <= self._array.nbytes:
            raise ShapeError(f"bytes {lo}..{hi} are not inside of the array: {self!r}")
        where = Geometry(self._position, self._shape, self._strides, lo, hi)
        return self._array.view_at(where, self._dtype)  # type: ignore[no-any-return]
