"""The only importer of the compiled core: starts it, and turns its return codes into exceptions.

The core (see ``csrc/zbig.h``) is C without ``Python.h``. What its signal handler must know of the
interpreter, whether the faulting thread holds the GIL and how to give it up, is handed to it here as
function pointers. ``PyGILState_Check`` is not among them: it is always 1 once a subinterpreter existed.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import faulthandler
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from dask_zbig.errors import ClosedError, LoadError, ScratchError, WindowError, ZBigError
from dask_zbig.memory._core import ffi, lib

__all__ = ["BLOCK", "PAGE", "check", "counters", "ffi", "free_window", "lib", "recount_mappings", "start"]

PAGE: int = lib.ZB_PAGE
BLOCK: int = lib.ZB_BLOCK

#: The core widens small writes from 16,000 mappings on; below that its estimate need not be right.
RECOUNT = 12_000

_started = False
_start_lock = threading.Lock()


def _pointer(name: str) -> int:
    address = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
    if address is None:
        raise ZBigError(f"this Python has no {name}()")
    return address


def _hooks() -> Any:
    hooks = ffi.new("zb_hooks *")
    current = "PyThreadState_GetUnchecked" if sys.version_info >= (3, 13) else "_PyThreadState_UncheckedGet"
    hooks.current = ffi.cast("void *(*)(void)", _pointer(current))
    if sys.version_info < (3, 12):  # there it is the GIL's holder, not this thread's own state
        hooks.this_thread = ffi.cast("void *(*)(void)", _pointer("PyGILState_GetThisThreadState"))
        hooks.ident_offset = _ident_offset()
    hooks.detach = ffi.cast("void *(*)(void)", _pointer("PyEval_SaveThread"))
    hooks.attach = ffi.cast("void (*)(void *)", _pointer("PyEval_RestoreThread"))
    return hooks


def _ident_offset() -> int:
    """Where a thread state has its thread's ident: no function tells, of a state of a subinterpreter. 0 if unclear."""
    get = ctypes.pythonapi.PyThreadState_Get
    get.restype, get.argtypes = ctypes.c_void_p, []
    words = (ctypes.c_uint64 * 32).from_address(get())  # (it is longer than that)
    found = [8 * i for i, word in enumerate(words) if word == threading.get_ident()]
    return found[0] if len(found) == 1 else 0


def _under_ours(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        lib.zb_handlers_off()
        try:
            return function(*args, **kwargs)
        finally:
            check(lib.zb_handlers(), "install the SIGSEGV handler")

    return wrapper


def _tame_faulthandler() -> None:
    """Keep faulthandler's signal handlers beneath ours, whenever it is enabled or disabled.

    Over ours, which is where ``enable()`` puts them, they take the next access to a view for a crash; and
    ``disable()`` puts back what was there before them, without us. The next view would be too late to notice.
    """
    faulthandler.enable = _under_ours(faulthandler.enable)
    faulthandler.disable = _under_ours(faulthandler.disable)


def start() -> None:
    """Start the core if need be, and make sure that its signal handlers are (still) in place.

    Called whenever a window is made and at every transaction boundary: others may replace handlers. Costs about
    a microsecond.
    """
    global _started
    if not _started:
        with _start_lock:
            if not _started:
                check(lib.zb_init(_hooks()), "start the memory core")
                _tame_faulthandler()
                # At exit loaders stop: whoever still touches an absent page must not wait for ever.
                atexit.register(lib.zb_shutdown)
                _started = True
    check(lib.zb_handlers(), "install the SIGSEGV handler")


_OF_FILES = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOENT,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
)


def check(result: int, what: str) -> None:
    """Raise the exception that fits a negative errno returned by the core."""
    if result >= 0:
        return
    number = -result
    text = f"cannot {what}: {os.strerror(number)}"
    if number == errno.ENOMEM:
        raise WindowError(
            f"{text}. The process is out of address space or of mappings "
            f"(see `ulimit -v` and /proc/sys/vm/max_map_count); use smaller slices"
        )
    if number == errno.EDEADLK:
        raise LoadError(
            number,
            f"{text}. A finalizer (__del__, or a weakref's callback) that the garbage collector ran touched a view "
            f"and could not wait for its bytes; abort the transaction",
        )
    if number == errno.EINTR:
        raise LoadError(number, f"{text}. Ctrl-C has ended a load: 0xFF was read instead; abort the transaction")
    if number == errno.ENOTCONN:
        raise ClosedError(f"{text}: the connection of this array is closed")
    if number in _OF_FILES:
        raise ScratchError(number, text)
    raise ZBigError(text)


_recount_at = RECOUNT


def recount_mappings() -> None:
    """Correct the core's estimate of its mappings, which only rises, if it has become large. Else costs nothing."""
    global _recount_at
    count = ffi.new("zb_count *")
    lib.zb_counters(count)
    if count.mappings < _recount_at:
        return
    with open("/proc/self/maps", "rb") as maps:
        true = maps.read().count(b"\n")
    lib.zb_mappings_set(true)
    _recount_at = max(RECOUNT, true + true // 4)


def free_window(handle: Any) -> None:
    """Free a window. The estimate may have its mappings still: the end of a transaction is to look at that."""
    global _recount_at
    lib.zb_window_free(handle)
    _recount_at = RECOUNT


def counters() -> dict[str, int]:
    """What the core counted since the process started: faults, fills, waits, bytes copied, mappings."""
    count = ffi.new("zb_count *")
    lib.zb_counters(count)
    names = [name for name, _ in ffi.typeof("zb_count").fields]
    return {name: int(getattr(count, name)) for name in names}
