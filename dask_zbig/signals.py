"""Ctrl-C where what it raises would do harm, as in the last step of a commit."""

from __future__ import annotations

# `_signal` is what `signal` wraps, looking for enums: that takes 6 us a call, and six calls are 2 % of a small commit.
import _signal  # type: ignore[import-not-found]
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["ctrl_c_postponed"]

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


def _settable(handler: Callable[..., Any]) -> bool:
    """Whether this is where handlers can be set: not if another thread than Python's first one imported `threading`."""
    try:
        _signal.signal(_SIGINT, handler)  # which it is
    except ValueError as error:
        if "main thread" in str(error):
            return False
        raise
    return True
