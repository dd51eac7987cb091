"""Loader threads: they take what faulting threads want from the core's queue and have it filled.

A faulting thread sleeps in a signal handler, wherever it was: it may hold any lock of the application. So a
loader never logs, never takes a lock that is held around access to a view, and never touches managed memory.

That is, our code does not. The garbage collector may run somebody's ``__del__`` or weakref callback in a loader, or
in a thread that holds one of the locks that loaders take, and it may touch a view. Loaders cannot be kept from
collecting: ``gc.disable()`` is for the whole process, and would undo, or be undone by, the application's own calls.
So such an access is served like any other, by whichever loader is free, and only its patience is bounded: for a
lock that loaders wait for may be held below it on the very same stack. After `PATIENCE` it reads 0xFF, and the
transaction is doomed: see ``zb_collecting`` in ``csrc/zbig.h``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import signal
import sys
import threading
import time

from dask_zbig.config import get
from dask_zbig.errors import ClosedError, LoadError, ScratchError, ZBigError
from dask_zbig.memory._native import BLOCK, check, ffi, lib
from dask_zbig.memory.space import Space, StaleFill, find_space

__all__ = ["ensure_loaders"]

#: A load may wait for a server: others must not wait behind it.
THREADS = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0

#: Seconds that a finalizer, or a loader, waits for bytes.
PATIENCE = 5.0

ctypes.pythonapi.PyThread_get_thread_ident.restype = ctypes.c_ulong

_lock = threading.Lock()
_pid = 0
_loaders: set[int] = set()
# A callback of the collector. (By cffi it would give up the GIL each time; and no Python function, in which an
# asynchronous exception might come up, before it has done anything.)
_collecting = ctypes.PYFUNCTYPE(None, ctypes.c_wchar_p, ctypes.py_object)(
    int(ffi.cast("uintptr_t", ffi.addressof(lib, "zb_collecting")))
)


def ensure_loaders() -> None:
    """Start the loader threads of this process, once."""
    global _pid
    if _pid == os.getpid():
        return
    with _lock:
        if _pid == os.getpid():
            return
        lib.zb_patience(int(1000 * min(PATIENCE, get("load-timeout"))))
        if _collecting not in gc.callbacks:
            gc.callbacks.append(_collecting)
        _loaders.clear()  # those of the process that we were forked from
        _start_native(0)
        lib.zb_loaders_come()  # (or a write that fails before it has done anything would be told to nobody)
        _pid = os.getpid()


def _start_native(number: int) -> None:
    """Start a loader in a thread of the kernel's own.

    Where gevent has put greenlets in the place of threads, a loader that was one of those would never run: whoever
    waits for it does so in the thread that all of them share.
    """
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        gevent.get_original("_thread", "start_new_thread")(_run, (number,))
    else:
        threading.Thread(target=_run, args=(number,), name=f"zbig-loader-{number}", daemon=True).start()


def _run(number: int) -> None:
    if number == 0:  # the others are its to start: the first view need not wait for all of them
        with contextlib.suppress(RuntimeError):  # no more threads to be had, or the interpreter ends: one is enough
            for k in range(1, THREADS):
                _start_native(k)
        # Its bytes are written now: not when memory may be short, nor while the first view waits. (If that fails, who
        # needs them tries again.)
        lib.zb_poison_fd()
    request = ffi.new("zb_request *")
    _loaders.add(ctypes.pythonapi.PyThread_get_thread_ident())  # (threading's would be the greenlet's)
    while lib.zb_request_next(request) == 0:
        space = find_space(request.space)
        if request.want & lib.ZB_WANT_NOTICE:
            if request.error == errno.EDEADLK and space is not None:
                with contextlib.suppress(ZBigError):  # (its transaction has failed already)
                    space.drop(0, 1 << 63)  # nobody else shall see 0xFF
            error = _notice(space, request.error, request.position)
            if error is not None:
                _raise_in(request.thread, error)
            lib.zb_request_told(request)
        if space is None:
            continue
        if request.want & lib.ZB_WANT_FILL:
            recheck = bool(request.want & lib.ZB_WANT_CHECK)
            _fill(space, request.position, request.thread, recheck)
        del space


def _notice(space: Space | None, number: int, position: int) -> ZBigError | None:
    if number == errno.EIO:  # it waited for a block that another thread had asked for
        return space.lost.get(position - position % BLOCK) if space is not None else None
    text = f"byte {position} of an array: {os.strerror(number)}"
    if number == errno.EINTR:
        return _interrupted(space, LoadError(number, f"Ctrl-C has ended a load: abort the transaction ({text})"))
    if number == errno.EDEADLK:
        return LoadError(number, f"a finalizer touched a view and could not wait for its bytes ({text})")
    if number == errno.ENOTCONN:  # from a space that was closed
        return ClosedError(f"a view was used after the connection of its array had been closed ({text})")
    return ScratchError(number, f"a change could not be kept and the transaction must be aborted ({text})")


def _interrupted(space: Space | None, error: ZBigError) -> ZBigError | None:
    """The main thread did not wait on after a SIGINT. It was not asked to wait for this notice: all may be over now."""
    if space is None or space.error != errno.EINTR or (service := space.service) is None:
        return None
    service.failed(0, 1 << 63, error)
    # Python's own handler raises KeyboardInterrupt, and another error after that would hit who handles it.
    return None if signal.getsignal(signal.SIGINT) is signal.default_int_handler else error


def _fill(space: Space, lo: int, thread: int, recheck: bool) -> None:
    """Serve one block, trying again until the deadline; then let it be 0xFF and say so."""
    try:
        deadline = time.monotonic() + get("load-timeout")
    except ValueError as error:  # what somebody set it to makes no sense
        _give_up(space, lo, thread, error)
        return
    pause = _FIRST_PAUSE
    while True:
        service = space.service
        try:
            if service is None:
                raise ClosedError("the array's connection is gone")
            service.serve(lo, lo + BLOCK, recheck)
            return
        except StaleFill:
            continue  # (what has changed need not be this block: then nobody would ask for it again)
        except BaseException as error:  # noqa: BLE001 - any error must reach the thread that waits
            if space.closed:
                return  # whoever waits was woken by that, too, and hears of it; who asked may be gone long since
            permanent = isinstance(error, ClosedError)
            if permanent or time.monotonic() + pause > deadline:
                _give_up(space, lo, thread, error)
                return
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _give_up(space: Space, lo: int, thread: int, error: BaseException) -> None:
    """Order matters: nothing may be committed and the thread must know, before it is woken."""
    service = space.service
    epoch = space.epoch
    if service is not None:
        service.failed(lo, lo + BLOCK, error)
    loud = error if isinstance(error, ZBigError) else LoadError(f"{type(error).__name__}: {error}")
    space.lost[lo] = type(loud)(*loud.args)  # (another one: of this the traceback refers to the space)
    _raise_in(thread, loud)
    fd = lib.zb_poison_fd()
    poison = (lo, lo + BLOCK, 0, fd)
    for window in space.windows():
        if window.start <= lo < window.stop:
            try:
                check(fd, "show 0xFF")
                window.fill(epoch, lo, lo + BLOCK, [poison])
            except StaleFill:
                return
            except ZBigError:  # there are no mappings left, or no memory
                window.lost()


def _raise_in(thread: int, error: ZBigError) -> None:
    """Raise asynchronously. The interpreter wants a class, which it calls with no argument."""
    if thread in _loaders:
        return  # which would end the loader, not what it was made to run
    cls = type(error)
    args = error.args

    def init(self: ZBigError) -> None:
        super(cls, self).__init__(*args)

    loud = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(loud))
