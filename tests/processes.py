"""The processes that faults happen to, and who tells them what is to happen at the steps of `tests.steps`."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

from tests import saver  # isort: skip

SECONDS = 100  # by then an answer has come, or never will


class Process:
    """One of `tests.saver`."""

    def __init__(self, site, *arguments):
        self.log = os.path.join(site.directory, f"{arguments[0]}-{next(site.numbers)}.log")
        with open(self.log, "wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, saver.__file__, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=site.environment,
                text=True,
            )
        self.answers = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def pid(self):
        return self.popen.pid

    def _listen(self):
        for line in self.popen.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def ask(self, *message):
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write(json.dumps(message) + "\n")
            self.popen.stdin.flush()

    def answer(self):
        """A line that it said; None if it died."""
        try:
            line = self.answers.get(timeout=SECONDS)
        except queue.Empty:
            self.popen.send_signal(signal.SIGUSR1)  # it writes where it is
            time.sleep(1)
            raise AssertionError(f"no answer in {SECONDS} s; it is at\n{self.tail()}") from None
        if line is None:
            self.popen.wait()
        return line

    def tail(self):
        with open(self.log, errors="replace") as log:
            return log.read()[-6000:]

    def kill(self):
        self.popen.kill()
        self.popen.wait()
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        self._thread.join(SECONDS)
        self.popen.stdout.close()


class _Awaited:
    """A fault that is to happen."""

    def __init__(self, fault):
        self.fault = fault
        self._left = fault.nth
        self._after = fault.after

    def happens_at(self, step):
        """Whether it happens now. To be told of every step."""
        if self._after is not None:
            if step == self._after:
                self._after = None
            return False
        self._left -= step == self.fault.step
        return step == self.fault.step and self._left == 0


class Control:
    """Answers processes at their steps."""

    def __init__(self, path, do):
        self.happened = []
        self._plan = []
        self._do = do
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def plan(self, faults=()):
        with self._lock:
            self._plan = [_Awaited(fault) for fault in faults]
            self.happened = []

    def _accept(self):
        while True:
            try:
                asking, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(asking,), daemon=True).start()

    def _answer(self, asking):
        with asking, asking.makefile() as lines:
            pid, _, step = lines.readline().strip().partition(" ")
            with self._lock:
                now = [awaited.fault for awaited in self._plan if awaited.happens_at(step)]
                self.happened += now
            answers = [self._do(fault, int(pid)) for fault in now]
            answer = next((a for a in ("die", "again") if a in answers), "go")
            with contextlib.suppress(OSError):  # it was killed
                asking.sendall(f"{answer}\n".encode())

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
