"""What a user may set, read from Dask's configuration under the name ``zbig``.

Every option and its default is in :data:`OPTIONS`, and nowhere else. Dask takes values from its YAML
files, from the environment (``DASK_ZBIG__LOAD_TIMEOUT=60``) and from ``dask.config.set``; so a cluster's
workers are configured the way Dask users already know::

    zbig:
      load-timeout: 60 s
      database-uris:
        "zeo://db.example.org:8100": "zeo://10.0.0.1:8100?blob_dir=/fast/cache"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import dask.config
from dask.utils import parse_bytes, parse_timedelta

__all__ = ["OPTIONS", "Option", "get"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its default, how its value is read, and what it means."""

    default: Any
    read: Callable[[Any], Any]
    doc: str


def _seconds(value: Any) -> float:
    seconds = float(parse_timedelta(value, default="s"))
    if not seconds > 0:
        raise ValueError("it must be more than 0 seconds")
    return seconds


def _size(value: Any) -> int:
    size = int(parse_bytes(value))
    if size < 0:
        raise ValueError("a size cannot be negative")
    return size


def _directory(value: Any) -> str | None:
    return None if value is None else str(value)


def _texts(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("it must map aliases to URIs")
    return {str(key): str(text) for key, text in value.items()}


OPTIONS: dict[str, Option] = {
    "load-timeout": Option("30 s", _seconds, "how long a failing load of array bytes is retried"),
    "scratch-directory": Option(
        None, _directory, "where changes and private blob caches are kept; None: the system's choice"
    ),
    "inline-limit": Option("64 KiB", _size, "a commit whose changes are no larger is stored without blobs"),
    "database-uris": Option(
        None, _texts, "alias of a database -> the URI or ZConfig text with which this process opens it"
    ),
    "zeo.wait-timeout": Option("30 s", _seconds, "how long to wait for a ZEO server to answer"),
    "lease-seconds": Option(
        "24 h", _seconds, "how long data that was staged but not published outlives whoever works at it"
    ),
}
"""Every option by its name below ``zbig``."""


@overload
def get(name: Literal["load-timeout", "zeo.wait-timeout", "lease-seconds"]) -> float: ...
@overload
def get(name: Literal["inline-limit"]) -> int: ...
@overload
def get(name: Literal["scratch-directory"]) -> str | None: ...
@overload
def get(name: Literal["database-uris"]) -> dict[str, str]: ...
def get(name: str) -> Any:
    """Return the present value of an option.

    Parameters
    ----------
    name
        A key of :data:`OPTIONS`, such as ``"load-timeout"``.

    Returns
    -------
    float, int, str, dict or None
        Times in seconds, sizes in bytes.

    Raises
    ------
    KeyError
        There is no such option.
    ValueError
        The configuration holds a value that cannot be read; the message names the option.

    Notes
    -----
    Safe to call from any thread. The value is looked up each time, so ``dask.config.set`` works.

    Examples
    --------
    >>> get("inline-limit")
    65536
    """
    option = OPTIONS[name]
    value = dask.config.get(f"zbig.{name}", default=option.default)
    try:
        return option.read(value)
    except (ValueError, TypeError, KeyError) as error:
        # not the value: an option may hold a URI with a password in it
        raise ValueError(f"the option zbig.{name} ({option.doc}) cannot be read: {error}") from None
