"""Loading what a call is going to touch before it does, in ordinary Python with ordinary exceptions.

A view's bytes load when they are touched, and what goes wrong then is told late: by an asynchronous exception, and
after 0xFF was read, which dooms the transaction. A call of ours knows what it is going to read. So that is brought here
first, as far as it makes sense; an error then is an exception of that very call, and the transaction may go on.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ZODB.POSException import ConflictError, POSError, POSKeyError

from dask_zbig.errors import LoadError, ZBigError
from dask_zbig.memory._native import check
from dask_zbig.patience import patiently
from dask_zbig.storage.segment import GoneError

if TYPE_CHECKING:
    from dask_zbig.memory.space import Window
    from dask_zbig.openfile import OpenFile

__all__ = ["ALL", "LAZY", "SOME", "bring", "bring_writable", "intact"]

T = TypeVar("T")

#: How much a call may fetch from a server up front. Nothing: a view is asked for, and loads when it is touched.
LAZY = 0
#: Of calls that may read all of an array or just a bit of it.
SOME = 64 << 20
#: Of calls that read all of it.
ALL = 1 << 63


def bring(opened: OpenFile, window: Window, lo: int, hi: int, most: int) -> None:
    """Map what is absent of [lo, hi), if what must be fetched for that has `most` bytes at most; else what is local.

    Called with `OpenFile.turn` held.

    Raises
    ------
    LoadError
        If it cannot be loaded, though that was tried until the deadline if it might heal; or if it could not be
        before, in this transaction, and 0xFF is shown. With `LAZY`, only if the extent map cannot be loaded.
    """
    if window.absent(lo, hi) < hi:
        _ordinary(lo, hi, partial(_fill, opened, lo, hi, most))
    if most:
        intact(opened, lo, hi)


def _fill(opened: OpenFile, lo: int, hi: int, most: int) -> None:
    opened.fill(lo, hi, local_only=most < ALL and (most == LAZY or opened.remote(lo, hi) > most))


def _ordinary(lo: int, hi: int, action: Callable[[], T]) -> T:
    """Patiently; and what is wrong with the extent map is a `LoadError`, as it is with the bytes."""
    try:
        return patiently(action)
    except (ZBigError, ConflictError):
        raise
    except POSKeyError as e:
        raise GoneError(f"cannot load the extent map of bytes {lo}..{hi}: the database does not have {e}") from e
    except POSError as e:
        raise LoadError(f"cannot load the extent map of bytes {lo}..{hi}: {type(e).__name__}: {e}") from e


def intact(opened: OpenFile, lo: int, hi: int) -> None:
    """Raise `LoadError` if some of [lo, hi) could not be loaded before, in this transaction, and is 0xFF."""
    why = opened.failure
    if why is not None and len(opened.poisoned(lo, hi)):
        raise LoadError(f"bytes of {lo}..{hi} could not be loaded, and the transaction must be aborted: {why}") from why


def bring_writable(opened: OpenFile, window: Window, lo: int, hi: int) -> None:
    """Map all of [lo, hi) and make it writable, as writes to it would do one by one.

    Called with `OpenFile.turn` held.

    Raises
    ------
    LoadError, ScratchError, ClosedError
        Nothing has changed then.
    ValueError
        If the array cannot be changed here.
    """
    if not opened.writeable:
        raise ValueError("this array is read-only: its connection shows the past, or its storage is read-only")
    while True:
        bring(opened, window, lo, hi, ALL)
        result = window.write(lo, None, hi - lo)
        if result == -errno.EFAULT:  # a file has become shorter than what is mapped of it
            opened.recheck(lo, hi)
        if result != -errno.EAGAIN:  # else it has been dropped meanwhile
            check(result, f"make bytes {lo}..{hi} writable: {hi - lo} bytes of scratch space are needed")
            return
