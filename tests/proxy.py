"""A network that fails: what clients of a ZEO server talk to instead, which passes messages on, or does not."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Trouble:
    """What happens to the `nth` message that has `word` in it, on its way to the server or from it.

    - lose: it is lost, and the connection too;
    - halve: half of it arrives before the connection is lost;
    - unanswer: it arrives, but the connection is lost before an answer could;
    - belate: the connection is lost for the sender at once, but the message arrives, some time after that;
    - delay: it takes its time.
    """

    what: str
    word: bytes = b""
    nth: int = 1
    to_server: bool = True
    seconds: float = 0.3


class Proxy:
    """Listens at unix sockets for who would talk to another one. Close it.

    A connection is accepted also while there is no server: it is made to wait for that. Each trouble happens once.
    """

    def __init__(self, upstream):
        self.upstream = upstream
        self.happened = []
        self._troubles = []
        self._lock = threading.Lock()
        self._listeners = []
        self._links = set()
        self._closed = threading.Event()

    def listen(self, path):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self._listeners.append((listener, path))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def expect(self, *troubles):
        """From now on there will be these troubles, and no others."""
        with self._lock:
            self._troubles = [[trouble, trouble.nth] for trouble in troubles]
            self.happened = []

    def cut(self):
        """All connections are lost."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()

    def close(self):
        self._closed.set()
        for listener, path in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            os.unlink(path)
        self.cut()

    def trouble(self, to_server, message):
        """What is to happen to a message; None: nothing."""
        with self._lock:
            for awaited in self._troubles:
                trouble = awaited[0]
                if trouble.to_server == to_server and trouble.word in message:
                    awaited[1] -= 1
                    if awaited[1] == 0:
                        self.happened.append(trouble)
                        return trouble
        return None

    def wait(self, seconds):
        """False once all is closed."""
        return not self._closed.wait(seconds)

    def ended(self, link):
        with self._lock:
            self._links.discard(link)

    def _accept(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            link = _Link(self, client)
            with self._lock:
                self._links.add(link)
            threading.Thread(target=link.run, daemon=True).start()


class _Link:
    """One connection, both ways."""

    def __init__(self, proxy, client):
        self.proxy = proxy
        self.client = client
        self.server = None
        self._closed = False
        self._belated = False

    def run(self):
        try:
            while not self._closed and self.proxy.wait(0.01):
                server = socket.socket(socket.AF_UNIX)
                try:
                    server.connect(self.proxy.upstream)
                except OSError:
                    server.close()
                    continue
                self.server = server
                if self._closed:
                    return
                down = threading.Thread(target=self._pump, args=(server, self.client, False), daemon=True)
                down.start()
                self._pump(self.client, server, True)
                down.join()
                return
        finally:
            # Not before: a thread that is about to receive would do so from whoever gets the descriptor's number next.
            for end in (self.client, self.server):
                if end is not None:
                    end.close()
            self.proxy.ended(self)

    def close(self):
        """Both ends are told; the descriptors are closed by who uses them."""
        self._closed = True
        for end in (self.client, self.server):
            if end is not None:
                _shut(end)

    def _pump(self, source, target, to_server):
        try:
            while (message := _message(source)) is not None:
                trouble = self.proxy.trouble(to_server, message)
                what = trouble.what if trouble else None
                if what == "belate":
                    self._belated = True
                    _shut(source)
                    self.proxy.wait(trouble.seconds)
                    target.sendall(message)
                    return
                if what == "delay":
                    self.proxy.wait(trouble.seconds)
                if what == "halve":
                    message = message[: len(message) // 2]
                if what != "lose" and not (self._belated and not to_server):
                    target.sendall(message)
                if what in ("lose", "halve", "unanswer"):
                    return
        except OSError:
            return  # the other direction has closed it
        finally:
            if to_server or not self._belated:
                self.close()


def _message(source):
    """A message as ZEO sends it, with its length; None at the end."""
    head = _exactly(source, 4)
    if head is None:
        return None
    body = _exactly(source, struct.unpack(">I", head)[0])
    return None if body is None else head + body


def _exactly(source, size):
    data = bytearray()
    while len(data) < size:
        piece = source.recv(size - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _shut(end):
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
