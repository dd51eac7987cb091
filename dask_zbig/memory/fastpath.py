"""`FastPath`: the short way to an array's elements and rows, for as long as nothing changes but bytes.

What the first access to an array in a transaction has found out (that the array is loaded and takes part in the
transaction, where its window is) is true until the transaction ends or the array is resized. Until then an integer, a
plain slice or a tuple of integers needs only a look at whether its bytes are mapped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_zbig.memory._native import ffi
from dask_zbig.memory.space import Window

__all__ = ["FastPath"]


class FastPath:
    """An array in C order that lies at the beginning of a window. Its owner breaks it by `cut`.

    Its methods return None, or False, where the long way must be gone: for what is out of bounds, empty, or not mapped.
    """

    __slots__ = ("_all", "_dtype", "_held", "_n", "_one", "_rest", "_row", "_strides", "_writeable", "window")

    def __init__(self, window: Window, shape: tuple[int, ...], dtype: np.dtype[Any], writeable: bool) -> None:
        self.window: Window | None = window  # which keeps the memory
        memory = ffi.buffer(ffi.cast("char *", window.address), window.length)
        self._all = np.ndarray(shape, dtype, memory)
        self._all.flags.writeable = writeable
        self._n = shape[0]
        self._rest = shape[1:]
        self._strides = self._all.strides
        self._row = self._strides[0]
        self._one = dtype.itemsize
        if dtype.kind == "V":  # of which an element is a view, and must keep the memory itself
            self._one = 0
        self._dtype = dtype
        self._writeable = writeable
        self._held: Any = None  # the base of views, which takes as long to make as all the rest; see `_view`

    def cut(self) -> None:
        """It is no way any more."""
        self.window = None
        self._held = None

    def _view(self, window: Window, lo: int, hi: int, shape: tuple[int, ...]) -> Any:
        """A view. Its base stays for the next one, but not when so much was seen that pages should be given back."""
        view = window.at(lo, hi, shape, self._dtype, self._writeable)
        self._held = None if window.lavish else view.base
        if self.window is None:  # another thread has cut it
            self._held = None
        return view

    def row(self, i: int) -> Any:
        """``array[i]``, or None: a view, or a scalar if there is but one axis."""
        window = self.window  # (another thread may cut it)
        if i < 0:
            i += self._n
        if window is None or not 0 <= i < self._n:
            return None
        lo = i * self._row
        hi = lo + self._row
        if not window.ready(lo, hi):
            return None
        if self._rest:
            return self._view(window, lo, hi, self._rest)
        return self._all[i] if self._one else None

    def rows(self, index: slice) -> Any:
        """``array[index]``, or None: a view."""
        window = self.window
        start, stop, step = index.indices(self._n)
        lo = start * self._row
        hi = stop * self._row
        if window is None or step != 1 or hi <= lo or not window.ready(lo, hi):
            return None
        return self._view(window, lo, hi, (stop - start, *self._rest))

    def item(self, index: tuple[Any, ...]) -> Any:
        """``array[index]`` of integers, one for each axis, or None: a scalar."""
        window = self.window
        lo = self._place(index)
        if window is None or lo < 0 or not window.ready(lo, lo + self._one):
            return None
        return self._all[index]

    def put(self, index: tuple[Any, ...], value: Any) -> bool:
        """``array[index] = value`` for such an index, or False. (A page that is clean makes itself dirty.)"""
        window = self.window
        lo = self._place(index)
        if window is None or lo < 0 or not window.ready(lo, lo + self._one):
            return False
        self._all[index] = value
        return True

    def _place(self, index: tuple[Any, ...]) -> int:
        """Where the element lies, or -1."""
        shape = self._all.shape
        if not self._one or len(index) != len(shape):
            return -1
        position = 0
        for i, n, stride in zip(index, shape, self._strides, strict=True):
            if i.__class__ is not int or not -n <= i < n:
                return -1
            position += (i if i >= 0 else i + n) * stride
        return position
