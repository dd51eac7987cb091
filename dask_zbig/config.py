"""What a user may set, read from Dask's configuration under the name ``zbig``.

Every option and its default is in :data:`OPTIONS`, and nowhere else: ``zbig.yaml`` beside this file, for users to copy
to ``~/.config/dask/``, is made of it, which a test checks. Dask takes values from its YAML files, from the environment
(``DASK_ZBIG__LOAD_TIMEOUT=60``) and from ``dask.config.set``; so a cluster's workers are configured the way Dask users
already know::

    zbig:
      load-timeout: 60 s
      database-uris:
        "zeo://db.example.org:8100": "zeo://10.0.0.1:8100?blob_dir=/fast/cache"
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, overload

import dask.config
from dask.utils import parse_bytes, parse_timedelta

from dask_zbig.errors import OptionError

__all__ = ["OPTIONS", "Option", "defaults_yaml", "get"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its default, how its value is read, and what it means."""

    default: Any
    read: Callable[[Any], Any]
    doc: str


_timedelta = lru_cache(64)(partial(parse_timedelta, default="s"))  # (options are asked for by every commit)
_bytes = lru_cache(64)(parse_bytes)


def _seconds(value: Any) -> float:
    seconds = float(_timedelta(value) if isinstance(value, str) else parse_timedelta(value, default="s"))
    if not seconds > 0:
        raise ValueError("it must be more than 0 seconds")
    return seconds


def _size(value: Any) -> int:
    size = int(_bytes(value) if isinstance(value, str) else parse_bytes(value))
    if size < 0:
        raise ValueError("a size cannot be negative")
    return size


def _directory(value: Any) -> str | None:
    return None if value is None else str(value)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("it must be text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it must be true or false")
    return value


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
    "tls.ca-file": Option(
        None, _text, "a file, or directory, of certificates that a server's must be one of or signed by"
    ),
    "tls.certificate": Option(None, _text, "the file of this process's certificate, for zeo:// by TCP"),
    "tls.key": Option(None, _text, "the file of its key; None: it is in the file of the certificate"),
    "tls.key-password": Option(
        None, _text, "where the key's password is: env:NAME, file:PATH or command:...; never the password"
    ),
    "tls.require": Option(False, _flag, "whether ZEO servers are never to be reached by TCP without TLS"),
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
@overload
def get(name: Literal["tls.ca-file", "tls.certificate", "tls.key", "tls.key-password"]) -> str | None: ...
@overload
def get(name: Literal["tls.require"]) -> bool: ...
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
    OptionError
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
        raise OptionError(f"the option zbig.{name} ({option.doc}) cannot be read: {error}") from None


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *above, last = name.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def defaults_yaml() -> str:
    """The text of ``zbig.yaml``: all defaults, with what they mean.

    Examples
    --------
    >>> print(defaults_yaml().splitlines()[3])
    zbig:
    """
    lines = [
        "# The options of dask_zbig and their defaults. What you change goes to ~/.config/dask/zbig.yaml, to another",
        "# place of Dask's configuration, or to the environment: DASK_ZBIG__LOAD_TIMEOUT=60. `dask-zbig config` shows",
        "# what is in force. (Made of dask_zbig.config.OPTIONS, by `dask-zbig config --yaml`.)",
        "zbig:",
    ]

    def write(tree: dict[str, Any], prefix: str, indent: str) -> None:
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if name in OPTIONS:
                wrapped = textwrap.wrap(OPTIONS[name].doc, 100)
                lines.extend(f"{indent}# {line}" for line in wrapped)
                lines.append(f"{indent}{key}: {'null' if value is None else json.dumps(value)}")
            else:
                lines.append(f"{indent}{key}:")
                write(value, f"{name}.", f"{indent}  ")

    write(_nested({name: option.default for name, option in OPTIONS.items()}), "", "  ")
    return "\n".join(lines) + "\n"


# As Dask's own libraries do: so that `dask config list` shows the options, and misspelt ones can be told.
dask.config.update_defaults({"zbig": _nested({name: option.default for name, option in OPTIONS.items()})})
