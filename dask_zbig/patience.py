"""Trying again what may heal by itself: a server that is restarted is there again after a while."""

from __future__ import annotations

import concurrent.futures
import errno
import time
from collections.abc import Callable
from typing import TypeVar

from transaction.interfaces import TransientError
from ZODB.POSException import ConflictError

from dask_zbig.config import get

__all__ = ["may_heal", "patiently"]

T = TypeVar("T")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
_PASSING = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT}


def may_heal(error: BaseException | None) -> bool:
    """Whether the same may go well later: the server is away, or something has run out for the moment.

    A conflict is not meant: that heals in another transaction.
    """
    while error is not None:
        if isinstance(error, TransientError):
            return not isinstance(error, ConflictError)
        if isinstance(error, (ConnectionError, TimeoutError, concurrent.futures.TimeoutError)):
            return True
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__
    return False


def patiently(action: Callable[[], T]) -> T:
    """What `action` returns, which is called again while it fails for what may heal, for `zbig.load-timeout` at most.

    Raises
    ------
    Exception
        What it raised at last.

    Examples
    --------
    >>> outcomes = [7, ConnectionError("away")]
    >>> def load():
    ...     outcome = outcomes.pop()
    ...     if isinstance(outcome, Exception):
    ...         raise outcome
    ...     return outcome
    >>> patiently(load)
    7
    """
    began, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            return action()
        except Exception as error:
            if not may_heal(error) or time.monotonic() + pause > began + get("load-timeout"):
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
