"""Ctrl-C where what it raises would do harm, as in the last step of a commit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["ctrl_c_postponed"]


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
    >>> try:
    ...     with ctrl_c_postponed():
    ...         signal.raise_signal(signal.SIGINT)
    ...         print("first all of this")
    ... except KeyboardInterrupt:
    ...     print("then Ctrl-C")
    first all of this
    then Ctrl-C
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[FrameType | None] = []

    def note(number: int, frame: FrameType | None) -> None:
        if once and came:
            handler(number, frame)
        came.append(frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(signal.SIGINT, came[0])
