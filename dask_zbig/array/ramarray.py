"""`RAMArray`: an array in memory that is used like a `ZBigArray`."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.array.resizable import ResizableArray
from dask_zbig.errors import WindowError

__all__ = ["RAMArray"]

_MAP_NORESERVE = 0x4000  # (in Python's mmap since 3.12 only)
_PAGE = mmap.PAGESIZE


class RAMArray(ResizableArray):
    """An array in memory with the interface of `ZBigArray`, but no database: for tests, and for intermediate data.

    As there, slices are views that alias the array and each other, before and after `resize` and `append`, which
    move no elements.

    Parameters
    ----------
    shape, dtype, order
        As of `ZBigArray`.

    Raises
    ------
    DTypeError, ShapeError
        As `ZBigArray` does.
    WindowError
        If there is not so much address space. It takes memory only where it is written to.

    Notes
    -----
    Thread-safe as an ndarray is; `resize` and `append` need a lock of yours. A forked child has a copy. Pickled and
    copied by value.

    Examples
    --------
    >>> import dask_zbig as dz
    >>> A = dz.RAMArray((2, 3), "i4")
    >>> a = A[:]
    >>> A.append([[1, 2, 3]])
    >>> a[0] = 7
    >>> A.tolist()
    [[7, 7, 7], [0, 0, 0], [1, 2, 3]]
    """

    def __init__(self, shape: int | Sequence[int], dtype: npt.DTypeLike = "f8", order: str = "C") -> None:
        self._begin(shape, dtype, order)
        # Room to grow, in place: no more than the machine's memory can be filled, and what is not costs nothing.
        self._memory = _reserve(self.nbytes, max(2 * self.nbytes, _machine_bytes()))

    def __getitem__(self, index: Any) -> Any:
        """A view of the elements that a basic index selects; a copy, for an advanced one."""
        return self._whole()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        """Change elements."""
        self._whole()[index] = value

    def _whole(self) -> npt.NDArray[Any]:
        return np.ndarray(self._shape, self._dtype, self._memory, 0, self.strides)

    def prefetch(self, index: Any = ..., *, writable: bool = False) -> None:
        """Nothing: it is here. Raises IndexError for an index that is none."""
        self[index]

    def resize(self, *shape: Any) -> None:
        """Change the shape, as `ZBigArray.resize` does.

        Raises
        ------
        ShapeError
            As for a new array.
        WindowError
            If the array outgrows the address range that was reserved for it: twice its first size, or the size
            of the machine's memory. The array is as before.
        """
        new = self._asked_shape(shape)
        new_bytes = math.prod(new) * self.itemsize
        if new_bytes > len(self._memory):
            raise WindowError(
                f"{self!r} cannot grow to {new}: {len(self._memory)} bytes of address space were reserved for it; "
                f"make a larger one"
            )
        # Also where it grows: an old, longer view may have written past the end.
        self._clear_from(min(self.nbytes, new_bytes))
        self._shape = new

    def _clear_from(self, position: int) -> None:
        """Zeros again, and the pages back to the kernel."""
        page = min(-(-position // _PAGE) * _PAGE, len(self._memory))
        self._memory[position:page] = bytes(page - position)
        if page < len(self._memory):
            self._memory.madvise(mmap.MADV_DONTNEED, page)

    def __reduce__(self) -> Any:
        return _filled, (np.array(self[...]), self._order)

    def __copy__(self) -> RAMArray:
        return _filled(self[...], self._order)

    def __deepcopy__(self, memo: Any) -> RAMArray:
        return self.__copy__()


def _filled(values: npt.NDArray[Any], order: str) -> RAMArray:
    array = RAMArray(values.shape, values.dtype, order)
    array[...] = values
    return array


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * _PAGE


def _reserve(needed: int, wanted: int) -> mmap.mmap:
    """Private memory of `wanted` bytes, or of `needed` if there is no more."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    for length in (wanted, max(needed, 1)):
        try:
            return mmap.mmap(-1, -(-length // _PAGE) * _PAGE, flags=flags)
        except (OSError, OverflowError) as e:
            error = e
    raise WindowError(f"cannot reserve {needed} bytes of address space: {error}")
