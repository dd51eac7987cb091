"""Ctrl-C where what it raises would do harm, as in the last step of a commit."""

from __future__ import annotations

# `_signal` is what `signal` wraps, looking for enums: that takes 6 us a call, and six calls are 2 % of a small commit.
import _signal  # type: ignore[import-not-found]
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["ctrl_c_not_inherited", "ctrl_c_postponed"]

_SIGINT = int(_signal.SIGINT)


@contextlib.contextmanager
def ctrl_c_postponed(*, once: bool = False) -> Iterator[None]:
    """Ctrl-C is handled when the block has ended, however that ends, and raises what it raises there.

    Python handles it in the main thread: in other threads there is nothing to do.

    Parameters
    ----------
    once : bool
        Whether a second Ctrl-C is handled at once: for a block that may wait for somebody else.

    Examples
    --------
    >>> import signal
    >>> try:
    ...     with ctrl_c_postponed():
    ...         signal.raise_signal(signal.SIGINT)
    ...         print("first all of this")
    ... except KeyboardInterrupt:
    ...     print("then Ctrl-C")
    first all of this
    then Ctrl-C
    """
    handler = _signal.getsignal(_SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler) or not _settable(handler):
        yield
        return
    came: list[FrameType | None] = []
    process = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # another thread has forked this child: here nobody will end the block
            _signal.signal(_SIGINT, handler)
            handler(number, frame)
        if once and came:
            handler(number, frame)
        came.append(frame)

    try:
        _signal.signal(_SIGINT, note)
        yield
    finally:
        try:
            _signal.signal(_SIGINT, handler)
        finally:
            if _signal.getsignal(_SIGINT) is note:  # another signal's handler has raised, before ours was set
                _signal.signal(_SIGINT, handler)
        if came:
            handler(_SIGINT, came[0])


@contextlib.contextmanager
def ctrl_c_not_inherited() -> Iterator[None]:
    """Processes and threads that are started in the block are not stopped by Ctrl-C, which a terminal sends to all.

    This one is, by whatever thread gets it, and is to end the others then. In the block it may be raised: see
    `ctrl_c_postponed`.
    """
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # (to start it in the block would lift the mask)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settable(handler: Callable[..., Any]) -> bool:
    """Whether this is where handlers can be set: not if another thread than Python's first one imported `threading`."""
    try:
        _signal.signal(_SIGINT, handler)  # which it is
    except ValueError as error:
        if "main thread" in str(error):
            return False
        raise
    return True
