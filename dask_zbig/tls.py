"""TLS between hosts: whose certificates are trusted, and why a handshake failed.

Both sides show a certificate, always. ZEO tries to connect again and again without a word, so :func:`diagnose` makes a
connection of its own and says what is wrong with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_zbig import config

if TYPE_CHECKING:
    from dask_zbig.uris import Address

__all__ = ["Credentials", "SettingsError", "configured", "diagnose"]

_TIMEOUT = 3.0  # seconds, of each step of a diagnosis
_SILENCE = 1.0  # seconds; a ZEO server speaks first, and at once. A TLS server waits for the client's hello
_COMMAND_TIMEOUT = 60.0  # seconds that a command may take to print a password
_CERTIFICATE = re.compile(r".+\.(pem|crt|cer|crl|r?[0-9]+)")  # in a directory; the last ones are openssl-rehash's
_logger = logging.getLogger(__name__)


class SettingsError(ValueError):
    """Certificates, keys or passwords that cannot be used; who knows whose they are makes an error of ours of it."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who this side is, and whom it trusts. Paths and names only: no secret is in here.

    Attributes
    ----------
    certificate
        A file with this side's certificate, and those between it and the CA.
    key
        The file of its key; None: it is in `certificate` too.
    trusted
        A file of certificates, or a directory of such files. The other side's must be one of them, or signed by one.
        Where there are revocation lists among them they are obeyed.
    key_password
        Where the key's password is: ``env:NAME``, ``file:PATH`` (its first line), or ``command:...`` (the first line
        that it prints). None: the key has none.
    """

    certificate: str
    key: str | None
    trusted: str
    key_password: str | None = None

    def server_context(self) -> ssl.SSLContext:
        """Return what a server needs; raises SettingsError."""
        context = self._fill(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        context.verify_mode = ssl.CERT_REQUIRED
        context.sslobject_class = _Handshake
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return what a client needs, the check of the server's name included; raises SettingsError."""
        context = self._fill(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        context.hostname_checks_common_name = False  # a client's certificate may carry any common name
        return context

    def _fill(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load_own(context)
        for path in _files(self.trusted):
            with _reading(f"the trusted certificates {path!r}"):
                context.load_verify_locations(path)
        context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN  # Python 3.13's own choice
        if context.cert_store_stats()["crl"]:
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return context

    def _load_own(self, context: ssl.SSLContext) -> None:
        key = self.key or self.certificate
        for path in (self.certificate, key):
            with _reading(repr(path)), open(path, "rb"):
                pass
        if os.stat(key).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            _logger.warning("the key %r can be read by others than its owner: chmod 600", key)
        asked = False

        def password() -> bytes:
            nonlocal asked
            asked = True
            return _password(self.key_password, key)

        try:
            context.load_cert_chain(self.certificate, key, password)  # a function, or OpenSSL asks the terminal
        except ssl.SSLError as error:
            hint = "the password is wrong" if asked else "they do not belong together, or are no PEM files"
            why = error.reason or "PEM"
            raise SettingsError(
                f"the certificate {self.certificate!r} and the key {key!r} cannot be used: {hint} ({why})"
            ) from None


def configured() -> Credentials | None:
    """Return a client's credentials as Dask's configuration has them, or None when there are none.

    Raises
    ------
    SettingsError
        Some options are set, and some that are needed too are not.
    """
    ca, certificate, key = (_path(config.get(name)) for name in ("tls.ca-file", "tls.certificate", "tls.key"))
    password = config.get("tls.key-password")
    if not (ca or certificate or key or password):
        return None
    if not ca or not certificate:
        missing = "certificate" if ca else "ca-file"
        raise SettingsError(f"TLS is configured by halves: the option zbig.tls.{missing} is not set")
    return Credentials(certificate, key, ca, password)


def _path(text: str | None) -> str | None:
    return os.path.abspath(os.path.expanduser(text)) if text else None


def _files(trusted: str) -> list[str]:
    if not os.path.isdir(trusted):
        return [trusted]
    with _reading(f"the directory {trusted!r}"):
        found = [os.path.join(trusted, name) for name in sorted(os.listdir(trusted)) if _CERTIFICATE.fullmatch(name)]
    if not found:
        raise SettingsError(f"there are no certificates (*.pem, *.crt) in {trusted!r}")
    return found


class _reading:  # noqa: N801 - a context manager, used like a function
    """Turns a failure to read a file into a SettingsError that names it."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            why = "no certificates in it" if isinstance(error, ssl.SSLError) else error.strerror
            raise SettingsError(f"{self._what} cannot be used: {why}") from None


# -- passwords


def _password(source: str | None, key: str) -> bytes:
    """Fetch a key's password. No message and no exception in here may hold it."""
    if source is None:
        raise SettingsError(f"the key {key!r} has a password: say where it is, by env:NAME, file:PATH or command:...")
    kind, _, rest = source.partition(":")
    fetch = _SOURCES.get(kind)
    if fetch is None or not rest:
        raise SettingsError(
            f"where the password of the key {key!r} is must be said by env:NAME, file:PATH or command:..., and must "
            "not be the password itself"
        )
    return fetch(rest)


def _from_environment(name: str) -> bytes:
    value = os.environb.get(os.fsencode(name))
    if value is None:
        raise SettingsError(f"the environment has no variable {name!r} with the key's password")
    return value


def _from_file(path: str) -> bytes:
    with _reading(f"the password file {path!r}"), open(os.path.expanduser(path), "rb") as file:
        return file.readline().rstrip(b"\r\n")


def _from_command(command: str) -> bytes:
    name = "the command for the key's password"
    try:
        arguments = shlex.split(command)
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=_COMMAND_TIMEOUT, check=False
        )
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "its quotes do not match"
        raise SettingsError(f"{name} cannot be run: {why}") from None
    except subprocess.TimeoutExpired:
        raise SettingsError(f"{name} did not end within {_COMMAND_TIMEOUT:g} seconds") from None
    if done.returncode:
        raise SettingsError(f"{name} failed with exit code {done.returncode}")
    return done.stdout.partition(b"\n")[0].rstrip(b"\r")


_SOURCES: dict[str, Callable[[str], bytes]] = {
    "env": _from_environment,
    "file": _from_file,
    "command": _from_command,
}


# -- why there is no connection


class _Handshake(ssl.SSLObject):
    """A server's side of a connection, which says whom it refuses, here and to them: asyncio does neither."""

    _refusal: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            _refused.log(_why(error, "client"))
            self._refusal = error
            # now asyncio sends what is to be sent, which is the alert; the client hears it, and hangs up
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "refused") from error


class _Refusals:
    """The log of refused clients: some try again hundreds of times a second."""

    EVERY = 10.0  # seconds between two lines of the same text

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, int]] = {}

    def log(self, why: str) -> None:
        now = time.monotonic()
        last, more = self._seen.get(why, (-self.EVERY, 0))
        if now - last < self.EVERY:
            self._seen[why] = last, more + 1
            return
        self._seen[why] = now, 0
        _logger.warning("no TLS with a client: %s%s", why, f" (and {more} times before)" if more else "")


_refused = _Refusals()


def _why(error: ssl.SSLError, peer: str) -> str:
    """Put an error of OpenSSL's into words."""
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the {peer}'s certificate is not accepted: {error.verify_message.rstrip('.')}"
    if "DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return f"the {peer} shows no certificate"
    alert = reason.partition("ALERT_")[2].lower().replace("_", " ")
    if alert in ("protocol version", "insufficient security"):
        return f"the {peer} speaks no version or cipher of TLS that is secure: {alert}"
    if alert:
        return f"the {peer} does not accept this side's certificate: {alert}"
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"):
        return f"the {peer} does not speak TLS"
    if isinstance(error, ssl.SSLEOFError):
        return f"the {peer} breaks off the handshake"
    return f"the TLS handshake failed: {reason.lower().replace('_', ' ') or error}"


def diagnose(
    addresses: Iterable[Address], context: ssl.SSLContext | None, hostname: str | None = None, *, late: bool = False
) -> str | None:
    """Connect to each of a server's addresses once, and return what is wrong with all of them.

    Parameters
    ----------
    context
        A client's; None: it speaks plain text.
    hostname
        The name in the server's certificate, when it is not the host's.
    late
        Tell also of what may be just a server that is starting or stopping.

    Returns
    -------
    str or None
        None when there is hope: a server answers as it should, or nobody listens yet. Unix sockets are not looked at.
    """
    found: list[str] = []
    for address in addresses:
        why = None if isinstance(address, str) else _diagnose(address, context, hostname, late)
        if why is None:
            return None
        found.append(f"{address[0]}:{address[1]}: {why}")
    return "; ".join(found) or None


def _diagnose(address: tuple[str, int], context: ssl.SSLContext | None, hostname: str | None, late: bool) -> str | None:
    host, port = address[0] or "127.0.0.1", address[1]  # as ZEO does
    try:
        with socket.create_connection((host, port), _TIMEOUT) as connection:
            if context is not None:
                return _diagnose_tls(connection, context, hostname or host, late)
            connection.settimeout(_SILENCE)
            greeting = _receive(connection)
        if greeting is None and _speaks_tls(host, port):
            return "the server speaks TLS, and here it is not configured: set Dask's options zbig.tls.*"
    except ssl.SSLError as error:
        return _why(error, "server")
    except OSError:
        return None
    return _look(greeting)


def _diagnose_tls(connection: socket.socket, context: ssl.SSLContext, hostname: str, late: bool) -> str | None:
    try:
        encrypted = context.wrap_socket(connection, server_hostname=hostname)
    except (ssl.SSLEOFError, ConnectionError):
        return "the server breaks off the handshake" if late else None
    with encrypted:
        try:
            greeting = _receive(encrypted)  # with TLS 1.3 it is here that one hears of being refused
        except (ssl.SSLEOFError, ConnectionError):
            greeting = b""
        if greeting == b"":
            return "the server hangs up after the handshake: its log may say why it does not accept this client"
        with contextlib.suppress(OSError):
            encrypted.unwrap()  # a proper end, or the server logs an error
    return _look(greeting)


def _receive(connection: socket.socket) -> bytes | None:
    """Return the first bytes that a server sends; None when it is silent."""
    try:
        return connection.recv(6)
    except TimeoutError:
        return None


def _look(greeting: bytes | None) -> str | None:
    """A ZEO server begins with the length, in four bytes, of the name of its protocol."""
    if greeting and not b"\0\0\0".startswith(greeting[:3]):
        return "what listens there is no ZEO server"
    return None


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is said or believed, this is to see whether it answers
    try:
        with socket.create_connection((host, port), _SILENCE) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
