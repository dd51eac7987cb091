"""Ctrl-C where what it raises would do harm, as in the last step of a commit."""

from __future__ import annotations

# `_signal` is what `signal` wraps, looking for enums: that takes 6 us a call, and six calls are 2 % of a small commit.
import _signal  # type: ignore[import-not-found]
import contextlib
import threading
from collections.abc import Iterator
from types import FrameType

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
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[FrameType | None] = []

    def note(number: int, frame: FrameType | None) -> None:
        if once and came:
            handler(number, frame)
        came.append(frame)

    _signal.signal(_SIGINT, note)
    try:
        yield
    finally:
        _signal.signal(_SIGINT, handler)
        if came:
            handler(_SIGINT, came[0])
