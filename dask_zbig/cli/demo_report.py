"""How the demo shows what happens: a line for each step, a bar meanwhile, and the memory it took."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
import psutil

__all__ = ["PeakMemory", "Report", "Step", "mib", "percent"]

MIB = 1 << 20
_BAR = 32


def mib(size: float) -> str:
    """A size as people read it."""
    return f"{size / MIB:.0f} MiB" if size < 1000 * MIB else f"{size / MIB / 1024:.2f} GiB"


def percent(fraction: float) -> str:
    """A fraction as people read it."""
    return f"{100 * fraction:.1f} %"


@dataclass
class Step:
    """A step under way. `what` and `size` (bytes, 0: it has none) may be set until it ends."""

    name: str
    what: str
    size: int = 0
    progress: Callable[[int, int], None] = lambda done, total: None


class Report:
    """Writes to standard output; the bar goes to standard error, and only to a terminal. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0
        self._bar = False
        self.check: Callable[[], None] = lambda: None  # called between steps; may raise

    def line(self, text: str = "", *, bold: bool = False) -> None:
        """Print a line."""
        with self._lock:
            self._clear()
            click.echo(click.style(text, bold=True) if bold else text)

    def header(self) -> None:
        """Print the names of the steps' columns."""
        self.line(f"  {'step':<46}{'size':>10}{'time':>9}{'rate':>13}")

    @contextmanager
    def step(self, name: str, what: str, size: int = 0) -> Iterator[Step]:
        """Show a bar while the block lasts, then its line."""
        self.check()
        step = Step(name, what, size, lambda done, total: self._show(name, done, total))
        self._show(name, 0, 1, at_once=True)
        started = time.perf_counter()
        try:
            yield step
            self.check()
        except BaseException:
            with self._lock:
                self._clear()
            raise
        seconds = time.perf_counter() - started
        size_text = mib(step.size) if step.size else ""
        rate = f"{step.size / seconds / MIB:.0f} MiB/s" if step.size else ""
        self.line(f"  {name:<9}{step.what:<37}{size_text:>10}{seconds:>7.1f} s{rate:>13}".rstrip())

    def _show(self, name: str, done: int, total: int, *, at_once: bool = False) -> None:
        if not self._terminal:
            return
        with self._lock:
            now = time.monotonic()
            if now - self._shown < 0.1 and not at_once:
                return
            self._shown = now
            self._bar = True
            part = done / total if total else 0.0
            full = round(part * _BAR)
            sys.stderr.write(f"\r  {name:<9}[{'#' * full}{'.' * (_BAR - full)}] {part:5.0%}\x1b[K")
            sys.stderr.flush()

    def _clear(self) -> None:
        if self._bar:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._bar = False


class PeakMemory:
    """Samples the memory of this process and all below it, each shared page counted once.

    Attributes
    ----------
    total, private : int
        The largest sums of bytes seen: of everything mapped, and of what is not a file's page cache.
    """

    def __init__(self, interval: float = 0.25) -> None:
        self.total = 0
        self.private = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self._interval):
            pids = [os.getpid(), *(child.pid for child in me.children(recursive=True))]
            sizes = [_memory(pid) for pid in pids]
            self.total = max(self.total, sum(total for total, _ in sizes))
            self.private = max(self.private, sum(private for _, private in sizes))


def _memory(pid: int) -> tuple[int, int]:
    """A process's share of everything, and of anonymous memory."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            found = {line.split()[0]: int(line.split()[1]) << 10 for line in file if line.startswith("Pss")}
    except (OSError, ValueError):  # it has just ended
        return 0, 0
    return found.get("Pss:", 0), found.get("Pss_Anon:", 0) + found.get("Pss_Shmem:", 0)
