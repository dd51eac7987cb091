"""What text can name a database: a path, a zodburi URI, or ZConfig text. Pure: nothing is opened here.

Also where secrets are recognised, so that none gets into a message, a graph or a log.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from importlib.metadata import entry_points
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from dask_zbig.errors import DatabaseURIError

__all__ = [
    "Address",
    "alias_of",
    "bad",
    "classify",
    "file_uri",
    "fingerprint",
    "has_secret",
    "is_loopback",
    "mask",
    "parse_file",
    "parse_zeo",
    "zeo_alias",
    "zeo_uri",
]

Address = str | tuple[str, int]
"""The path of a unix socket, or host and port."""

Kind = Literal["path", "uri", "zconfig"]

_ZCONFIG = re.compile(r"^\s*<\s*[a-z]", re.IGNORECASE | re.MULTILINE)
_URI = re.compile(r"^([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*):", re.IGNORECASE)

# A word that holds a secret, then "=value" up to a separator, or, in ZConfig, the rest of its line.
# "password-function" names a function, not a password.
_SECRET = re.compile(
    r"(?P<key>[\w-]*(?:passw|passphrase|pwd|secret|token|credential|(?:api|access)_?key)(?![\w-]*-function)[\w-]*)"
    r"(?:(?P<equals>\s*(?:=|%3D)\s*)(?:'[^']*'|[^&#\n'\"()]+)|(?P<space>[ \t]+)\S[^\n]*)",
    re.IGNORECASE,
)
_USER = re.compile(r"(://[^/?#\s:@]*:)[^/?#\s]*@")
_ACCEPTED = (
    "a database is named by a file's path ('data/x.fs'), a URI ('zeo://localhost:8100', "
    "'zeo:///path/to/socket', 'file:///data/x.fs', 'memory://', 'zconfig:///path/to/zodb.conf'), "
    "or ZConfig text ('<zodb> ... </zodb>', '<zeoclient> ... </zeoclient>')"
)


def mask(text: str) -> str:
    """Return `text` with passwords and the like replaced by ``***``.

    >>> mask("zeo://db:8100?username=ann&password=sesame&storage=1")
    'zeo://db:8100?username=ann&password=***&storage=1'
    """

    def hide(match: re.Match[str]) -> str:
        return match["key"] + (match["equals"] or match["space"]) + "***"

    return _SECRET.sub(hide, _USER.sub(r"\1***@", text))


def has_secret(text: str) -> bool:
    """Return whether :func:`mask` finds something to hide."""
    return mask(text) != text


def fingerprint(text: str) -> str:
    """Return a short name for `text` that gives none of its secrets away."""
    return hashlib.sha256(mask(text).encode(errors="surrogateescape")).hexdigest()[:16]


def bad(where: object, why: object) -> DatabaseURIError:
    """Make the error for `where`, secrets masked, with what would be accepted."""
    if isinstance(where, os.PathLike):
        where = os.fsdecode(os.fspath(where))
    text = repr(mask(where) if isinstance(where, str) else where)
    return DatabaseURIError(f"{text} names no database: {mask(str(why))}; {_ACCEPTED}")


def classify(where: str | os.PathLike[str]) -> tuple[Kind, str]:
    """Return what kind of text `where` is, and the text.

    Raises
    ------
    DatabaseURIError
        It is no text or empty, or its scheme is unknown to zodburi.
    """
    text = os.fsdecode(where) if isinstance(where, os.PathLike) else where
    if not isinstance(text, str):
        raise bad(where, f"it is of type {type(where).__name__}")
    if not text.strip():
        raise bad(where, "it is empty")
    if "\0" in text:
        raise bad(where, "it contains a null byte")
    if isinstance(where, os.PathLike):
        return "path", text
    if _ZCONFIG.search(where):
        return "zconfig", where
    scheme = _SCHEME.match(where)
    if scheme is None:
        return "path", where
    known = {entry.name for entry in entry_points(group="zodburi.resolvers")}
    name = scheme[1]
    if name in known and (_URI.match(where) or where.startswith("demo:(")):
        return "uri", where
    if name in known:
        raise bad(where, f"{name!r} must be followed by '://'")
    if _URI.match(where):
        raise bad(where, f"the scheme {name!r} is not one of {', '.join(sorted(known))}")
    return "path", where


def parse_file(uri: str) -> tuple[str, dict[str, str]] | None:
    """Return path and options of a ``file://`` URI, or None when it needs more than a FileStorage."""
    path, _, query = uri.removeprefix("file://").partition("?")
    options = dict(parse_qsl(query))
    if "demostorage" in options or options.get("blobstorage_layout", "automatic") != "automatic":
        return None
    if not path:
        raise bad(uri, "it has no path")
    return os.path.abspath(path), options


def parse_zeo(uri: str) -> tuple[Address, dict[str, str]]:
    """Return the address and the options of a ``zeo://`` URI.

    >>> parse_zeo("zeo://localhost:8100?storage=2")
    (('localhost', 8100), {'storage': '2'})
    >>> parse_zeo("zeo:///run/x.sock")
    ('/run/x.sock', {})
    """
    parts = urlsplit(uri.replace("zeo://", "http://", 1))
    options = dict(parse_qsl(parts.query))
    try:
        port = parts.port
    except ValueError as error:
        raise bad(uri, error) from None
    if parts.netloc:
        return (parts.hostname or "", 9991 if port is None else port), options
    if parts.path in ("", "/"):
        raise bad(uri, "it has neither a host nor the path of a socket")
    return os.path.normpath(parts.path), options


def is_loopback(host: str) -> bool:
    """Whether a server that listens at a host's name or address can be reached from that host only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def zeo_uri(address: Address, **options: Any) -> str:
    """Return the URI of a ZEO server.

    >>> zeo_uri(("127.0.0.1", 8100), blob_dir="/data/x.fs.blobs", shared_blob_dir="true")
    'zeo://127.0.0.1:8100?blob_dir=/data/x.fs.blobs&shared_blob_dir=true'
    """
    if isinstance(address, str):
        place = address
    else:
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        place = f"{host}:{address[1]}"
    query = urlencode(options, quote_via=quote, safe="/")
    return f"zeo://{place}?{query}" if query else f"zeo://{place}"


def zeo_alias(addresses: list[Address], storage: str) -> str:
    """Return the alias of a storage of a ZEO server, the same however it was opened."""
    place = ",".join(zeo_uri(address).removeprefix("zeo://") for address in addresses)
    return f"zeo://{place}" + ("" if storage == "1" else f"#{quote(storage)}")


def alias_of(where: str) -> str | None:
    """Return the alias of the database that a path or URI names, if the text tells."""
    kind, text = classify(where)
    if kind == "path":
        return f"file://{os.path.realpath(text)}"
    if kind == "uri" and text.startswith("zeo://"):
        address, options = parse_zeo(text)
        return zeo_alias([address], options.get("storage", "1"))
    if kind == "uri" and text.startswith("file://"):
        parsed = parse_file(text)
        return None if parsed is None else f"file://{os.path.realpath(parsed[0])}"
    return None


def file_uri(path: str, **options: str) -> str:
    """Return the URI of a FileStorage; zodburi takes the path as it is, without quotes."""
    return f"file://{path}?{urlencode(options, quote_via=quote, safe='/')}"
