"""What the commands share: opening a database, finding what is in it, and how sizes and tables are written."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import click
import transaction
from dask.utils import format_bytes, parse_bytes
from persistent import Persistent
from persistent.list import PersistentList
from ZODB.TimeStamp import TimeStamp

from dask_zbig import database, uris
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.errors import DatabaseUnavailableError

__all__ = [
    "Progress",
    "arrays",
    "as_json_option",
    "connected",
    "find",
    "find_array",
    "moment",
    "opened",
    "place_for",
    "shortened",
    "size_text",
    "sizes",
    "table",
    "uri_argument",
]

#: Seconds after which it is said what one waits for.
_SOON = 2.0
#: What belongs to dask_zbig itself, and holds no arrays.
_OURS = ("dask_zbig.staging",)

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
uri_argument = click.argument("uri")


# -- databases


@contextlib.contextmanager
def opened(uri: str, *, write: bool = False, create: bool = False) -> Iterator[Any]:
    """A database, closed at the end.

    Parameters
    ----------
    write : bool
        If not, the file of a FileStorage is not locked: another process may have it open.
    create : bool
        Whether to make a file that does not exist.
    """
    alias = uris.alias_of(uri)
    path = alias.removeprefix("file://") if alias is not None and alias.startswith("file://") else None
    if path is not None and not create and not os.path.exists(path):
        raise DatabaseUnavailableError(f"there is no FileStorage {path!r}")
    if path is not None and not write and uris.classify(uri)[0] == "path":
        uri = uris.file_uri(os.path.abspath(uri), read_only="1")
    with _patience(uri):
        db = database.open(uri)
    with contextlib.closing(db):
        yield db


@contextlib.contextmanager
def _patience(uri: str) -> Iterator[None]:
    """Say, on a terminal, what one waits for if a server does not answer soon."""
    text = f"waiting for {uris.mask(uri)}, as long as zbig.zeo.wait-timeout says"
    timer = threading.Timer(_SOON, click.echo, [text], {"err": True})
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def connected(db: Any) -> Iterator[tuple[Any, Any]]:
    """A connection to it, and its transaction manager, aborted at the end."""
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    try:
        yield connection, manager
    finally:
        manager.abort()
        connection.close()


# -- what is in a database


def _is_container(value: Any) -> bool:
    # (BTrees are no Mappings, but have all of that)
    return isinstance(value, (Mapping, list, tuple, PersistentList)) or (
        isinstance(value, Persistent) and not isinstance(value, ZBigArray) and hasattr(type(value), "items")
    )


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(container, (list, tuple, PersistentList)):
        yield from enumerate(container)
    elif hasattr(container, "items"):
        yield from container.items()


def arrays(connection: Any, path: str = "") -> Iterator[tuple[str, ZBigArray]]:
    """All arrays below a path, each by the first path that leads to it, through mappings and sequences."""
    seen: set[Any] = set()

    def walk(value: Any, name: str) -> Iterator[tuple[str, ZBigArray]]:
        key = value._p_oid if isinstance(value, Persistent) else None
        if key is not None and key in seen:
            return
        if isinstance(value, ZBigArray):
            seen.add(key)
            yield name, value
        elif _is_container(value):
            seen.add(key)
            for k, v in _items(value):
                if not name and k in _OURS:
                    continue
                if isinstance(v, ZBigArray) or _is_container(v):
                    yield from walk(v, f"{name}/{k}" if name else str(k))

    start = path.strip("/")
    yield from walk(find(connection, start) if start else connection.root(), start)


def find(connection: Any, path: str) -> Any:
    """What is at a path: keys from the root on, separated by "/". A key may itself have a "/" in it."""
    parts = path.strip("/").split("/")
    value: Any = connection.root()
    done = 0
    while done < len(parts):
        for stop in range(len(parts), done, -1):
            there, child = _child(value, "/".join(parts[done:stop]))
            if there:
                value, done = child, stop
                break
        else:
            raise click.ClickException(f"there is nothing at {'/'.join(parts[: done + 1])!r}{_hint(value)}")
    return value


def _child(value: Any, name: str) -> tuple[bool, Any]:
    if not _is_container(value):
        return False, None
    for key in (name, int(name)) if name.isdecimal() else (name,):
        # (a BTree whose keys are numbers raises TypeError for a text, a list for all but an index)
        with contextlib.suppress(KeyError, IndexError, TypeError):
            return True, value[key]
    return False, None


def _hint(value: Any) -> str:
    if not _is_container(value):
        return f": a {type(value).__name__} is no container"
    names = [str(k) for k, _ in zip((k for k, _ in _items(value) if k not in _OURS), range(8), strict=False)]
    return f"; there is {', '.join(map(repr, names))}{', ...' if len(names) == 8 else ''}" if names else ""


def find_array(connection: Any, path: str) -> ZBigArray:
    """The array at a path."""
    value = find(connection, path)
    if not isinstance(value, ZBigArray):
        raise click.ClickException(f"{path!r} is no ZBigArray, but a {type(value).__name__}")
    return value


def place_for(connection: Any, path: str) -> tuple[Any, Any]:
    """The container in which something is to be put under a key; containers that are missing are made."""
    from persistent.mapping import PersistentMapping

    *above, last = [part for part in path.split("/") if part] or [""]
    if not last:
        raise click.ClickException("a path needs a name, such as 'A' or 'group/A'")
    container: Any = connection.root()
    for n, part in enumerate(above, 1):
        there, child = _child(container, part)
        if not there:
            child = container[part] = PersistentMapping()
        if not hasattr(child, "items") or isinstance(child, ZBigArray):
            raise click.ClickException(f"{'/'.join(above[:n])!r} is no mapping, but a {type(child).__name__}")
        container = child
    try:
        _ = last in container
    except TypeError:  # a BTree whose keys are numbers
        return container, int(last) if last.isdecimal() else last
    return container, last


# -- options


def sizes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """A size such as "1GiB"."""
    if value is None:
        return None
    try:
        size = int(parse_bytes(value))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no size, such as 1GiB") from error
    if size <= 0:
        raise click.BadParameter("it must be more than 0")
    return size


# -- text


def size_text(size: float) -> str:
    """A size as people read it."""
    return str(format_bytes(int(size))).replace("kiB", "KiB")


def shortened(text: str, most: int = 28) -> str:
    """The beginning of a text, if it is long."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def moment(tid: bytes | None) -> str | None:
    """When a transaction was, in UTC."""
    if tid is None or tid == bytes(8):
        return None
    seconds = TimeStamp(tid).timeTime()
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Columns as wide as need be."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = []
    for line in [header, *rows]:
        cells = [
            text.rjust(width) if name in right else text.ljust(width)
            for text, width, name in zip(line, widths, header, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Progress:
    """A bar on standard error, if that is a terminal."""

    _WIDTH = 30

    def __init__(self, what: str, total: int, *, unit: str | None = None, show: bool | None = None) -> None:
        self._what = what
        self._total = total
        self._unit = unit  # None: bytes
        self._done = 0
        self._show = sys.stderr.isatty() if show is None else show
        self._started = time.monotonic()
        self._shown = 0.0

    def __enter__(self) -> Progress:
        self.add(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._show and self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def add(self, size: int) -> None:
        """So much more is done."""
        self.at(self._done + size, self._total)

    def at(self, done: int, total: int) -> None:
        """So much of so much is done."""
        self._done, self._total = done, total
        now = time.monotonic()
        if not self._show or (now - self._shown < 0.1 and self._done < self._total):
            return
        self._shown = now
        part = self._done / self._total if self._total else 1.0
        full = round(part * self._WIDTH)
        rate = self._done / max(now - self._started, 1e-3)
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate and part < 1 else ""
        if self._unit is None:
            much = f"{size_text(self._done)} at {size_text(rate)}/s"
        else:
            much = f"{self._done} of {self._total} {self._unit}"
        self._write(f"{self._what} [{'#' * full}{'.' * (self._WIDTH - full)}] {part:4.0%} {much}{left}")

    def wait(self) -> None:
        """Some time has gone by, in which nobody knows how much was done."""
        if self._show:
            self._shown = time.monotonic()
            self._write(f"{self._what}: {self._shown - self._started:.0f} s")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()
