"""Spaces, windows and views: a file's bytes as ndarrays.

A `Space` is one file's bytes in this process; a `Window` is a reserved address range onto a part of it. What
lies behind the bytes is the business of the space's `Service`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dask_zbig.errors import ForkError, ZBigError
from dask_zbig.memory._native import BLOCK, check, ffi, free_window, lib, start
from dask_zbig.tempfiles import Hold, new_name

__all__ = ["RUN", "Generation", "Service", "Space", "StaleFill", "Window", "find_space", "place_of"]

#: Runs of dirty pages: [start, stop) of the file lies in scratch file `file` at `offset`.
RUN = np.dtype([("start", "<u8"), ("stop", "<u8"), ("offset", "<u8"), ("file", "<u8")])
_PIECE = np.dtype([("start", "<u8"), ("stop", "<u8"), ("offset", "<i8"), ("fd", "<i8")])
_ESTALE = 116
#: When the last view of a window goes, pages are given back if views of this many bytes were made.
RELEASE_BYTES = 16 << 20

_ids = itertools.count(1)
_spaces: weakref.WeakValueDictionary[int, Space] = weakref.WeakValueDictionary()


class StaleFill(Exception):
    """A fill came after the bytes it was planned for had changed: plan again."""


class Service(Protocol):
    """What a loader asks of the owner of a space. Called from loader threads."""

    def serve(self, lo: int, hi: int, recheck: bool) -> None:
        """Fill the blocks [lo, hi), or raise; `recheck`: what was mapped there had become too short."""

    def failed(self, lo: int, hi: int, error: BaseException) -> None:
        """The blocks will be filled by 0xFF because of `error`: let nothing that depends on them be kept."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What a freeze yields: where the dirty pages lie, and the scratch files that now are the caller's."""

    runs: npt.NDArray[np.void]
    first_file: int
    files: list[str]


def place_of(view: npt.NDArray[Any]) -> tuple[Space, int] | None:
    """The space that an ndarray is a view of, and the position of its element (0, ..., 0); None if of none."""
    base: Any = view
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, _Lease):
        return None
    address: int = view.__array_interface__["data"][0]
    return base.window.space, address - base.window.address + base.window.start


def find_space(number: int) -> Space | None:
    """The living space of this number."""
    return _spaces.get(number)


class Window:
    """An address range. Lives as long as anything refers to it: a view does, by its base.

    Use `view` to get arrays. Thread-safe.
    """

    __slots__ = (
        "__weakref__", "_bases", "_handle", "_lease", "_memory", "_seen", "address", "length", "space", "start",
    )  # fmt: skip

    def __init__(self, space: Space, start_: int, length: int) -> None:
        out = ffi.new("zb_window **")
        what = f"reserve {length} bytes of address space"
        check(lib.zb_window_new(out, space._handle, start_, length), what)
        self._handle = out[0]
        self.space = space
        self.start = start_
        self.length = -(-length // BLOCK) * BLOCK
        #: Of its first byte.
        self.address = int(ffi.cast("uintptr_t", lib.zb_window_base(self._handle)))
        self._memory = {"version": 3, "data": (self.address, False), "typestr": "|u1", "shape": (self.length,)}
        self._lease: weakref.ref[_Lease] | None = None
        self._bases: list[weakref.ref[npt.NDArray[np.uint8]] | None] = [None, None]  # read-only, writeable
        self._seen = 0  # bytes that views were made of since pages were given back
        # Not at exit: a thread that is still running may be looking at it.
        weakref.finalize(self, free_window, self._handle).atexit = False

    @property
    def stop(self) -> int:
        """Position after the window's last byte."""
        return self.start + self.length

    def view(
        self,
        position: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...],
        writeable: bool,
    ) -> npt.NDArray[Any]:
        """An ndarray onto the window whose element (0, ..., 0) lies at `position` of the file.

        The caller has checked that all of it lies inside the window.
        """
        return np.ndarray(shape, dtype, self._base(writeable), position - self.start, strides)

    def at(self, lo: int, hi: int, shape: tuple[int, ...], dtype: np.dtype[Any], writeable: bool) -> npt.NDArray[Any]:
        """The same for the bytes [lo, hi), which are the view's without gaps, in C order. Notes that it was made."""
        self._seen += hi - lo
        return np.ndarray(shape, dtype, self._base(writeable), lo - self.start)

    def _base(self, writeable: bool) -> npt.NDArray[np.uint8]:
        """All of the window, as a base of views: the same for as long as one of them lives."""
        ref = self._bases[writeable]
        base = ref() if ref is not None else None
        if base is None:
            lease = self._lease() if self._lease is not None else None
            if lease is None:
                lease = _Lease(self)
                self._lease = weakref.ref(lease, self._idle_again)
            base = lease.array(writeable)
            self._bases[writeable] = weakref.ref(base)
        return base

    @property
    def lavish(self) -> bool:
        """Whether so much was seen that pages are given back when the last view is gone."""
        return self._seen >= RELEASE_BYTES

    def saw(self, size: int) -> None:
        """A view of `size` bytes is made."""
        self._seen += size

    def _idle_again(self, _: object) -> None:
        """The last view is gone. Clean pages that stay mapped look like a leak to whoever watches the process."""
        if self.lavish:
            self.release()

    @property
    def idle(self) -> bool:
        """Whether no view of this window is alive."""
        return self._lease is None or self._lease() is None

    def absent(self, lo: int, hi: int) -> int:
        """The position of the first absent block of [lo, hi), or something >= hi."""
        return int(lib.zb_absent(self._handle, lo, hi))

    def ready(self, lo: int, hi: int) -> bool:
        """Whether an access to [lo, hi) can be served and needs no loader; in a forked child, none can."""
        result = lib.zb_ready(self._handle, lo, hi)
        check(result, "install the SIGSEGV handler")
        return bool(result)

    def present(self, lo: int, hi: int) -> int:
        """The position of the first block of [lo, hi) that is filled, or something >= hi."""
        return int(lib.zb_present(self._handle, lo, hi))

    def fill(self, epoch: int, lo: int, hi: int, pieces: Sequence[tuple[int, int, int, int]]) -> None:
        """Map absent blocks of [lo, hi) by `pieces` (start, stop, offset, fd); fd < 0 is a hole.

        Raises
        ------
        StaleFill
            If the space's epoch is not `epoch`.
        """
        table = np.array(pieces, _PIECE)
        pointer = ffi.cast("zb_piece *", table.ctypes.data)
        result = lib.zb_fill(self._handle, epoch, lo, hi, pointer, len(table))
        if result == -_ESTALE:
            raise StaleFill
        check(result, f"map bytes {lo}..{hi}")

    def lost(self) -> None:
        """Nothing of it can be mapped: it shows zeros until the generation is discarded, which has failed."""
        lib.zb_lost(self._handle, errno.ENOMEM)

    def write(self, lo: int, data: npt.NDArray[np.uint8] | None, size: int) -> int:
        """Make [lo, lo + size) dirty; with `data` (whole pages) by its bytes. Returns 0 or a negative errno.

        See ``zb_write``. The GIL is not held meanwhile.
        """
        pointer = ffi.NULL if data is None else ffi.cast("void *", data.__array_interface__["data"][0])
        return int(lib.zb_write(self._handle, lo, lo + size, pointer))

    def release(self) -> None:
        """Give resident pages back to the kernel; they come back from the page cache when touched."""
        self._seen = 0
        check(lib.zb_release(self._handle), "release pages")


class _Lease:
    """The base of views: while one lives, its lease does, and so does the window."""

    __slots__ = ("__array_interface__", "__weakref__", "window")

    def __init__(self, window: Window) -> None:
        self.window = window
        self.__array_interface__ = window._memory

    def array(self, writeable: bool) -> npt.NDArray[np.uint8]:
        array = np.asarray(self)
        if not writeable:
            array.flags.writeable = False
        return array


class Space:
    """One file's bytes in this process.

    Parameters
    ----------
    directory : str
        Where scratch files are made.
    service : Service
        Who fills; held weakly.

    Notes
    -----
    Thread-safe. A process forked from the one that made it must not use it: `ForkError`.
    """

    def __init__(self, directory: str, service: Service) -> None:
        start()
        self.number = next(_ids)
        self._pid = os.getpid()
        self._prefix = new_name()
        self._place = [directory, self._prefix]  # (shared with the finalizer)
        self._holds = [Hold(directory)]  # (too)
        out = ffi.new("zb_space **")
        check(
            lib.zb_space_new(out, self.number, os.fsencode(directory), self._prefix.encode()),
            f"use {directory!r} for scratch files",
        )
        self._handle = out[0]
        self._service = weakref.ref(service)
        #: What could not be loaded in this generation: position of the block -> why. For who still waits for it.
        self.lost: dict[int, ZBigError] = {}
        self.closed = False
        self._windows: list[weakref.ref[Window]] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end_space, self._handle, self._place, self._holds).atexit = False
        _spaces[self.number] = self

    @property
    def service(self) -> Service | None:
        """The owner, while it lives."""
        return self._service()

    @property
    def directory(self) -> str:
        """Where scratch files are made."""
        return self._place[0]

    def move_scratch(self, directory: str) -> None:
        """Make scratch files in another directory. Not while pages are dirty."""
        if self.dirty_pages:
            raise ValueError("the scratch directory cannot change while pages are dirty")
        hold = Hold(directory)
        try:
            check(lib.zb_space_scratch(self._handle, os.fsencode(directory)), f"use {directory!r}")
        except BaseException:
            hold.release()
            raise
        self._place[0] = directory
        self._holds.append(hold)
        self._holds.pop(0).release()

    def set_transient(self, transient: bool) -> None:
        """Whether scratch files need never get to the disk: a server keeps what is written."""
        lib.zb_space_transient(self._handle, transient)

    def check_process(self) -> None:
        """Raise `ForkError` in a forked child."""
        if os.getpid() != self._pid:
            raise ForkError(
                f"this array was opened in process {self._pid}, from which process {os.getpid()} was forked; "
                f"open the database again in the child, or start it with 'spawn'"
            )

    # -- windows

    def windows(self) -> list[Window]:
        """The living ones."""
        with self._lock:
            alive = [(ref, window) for ref in self._windows if (window := ref()) is not None]
            self._windows = [ref for ref, _ in alive]
        return [window for _, window in alive]

    def window(self, position: int, length: int) -> Window:
        """A new window that covers [position, position + length)."""
        self.check_process()
        start()
        first = position - position % BLOCK
        window = Window(self, first, max(position + length - first, 1))
        with self._lock:
            self._windows.append(weakref.ref(window))
        return window

    # -- state

    @property
    def epoch(self) -> int:
        """Changes whenever mapped bytes are dropped."""
        return int(lib.zb_space_epoch(self._handle))

    @property
    def dirty_pages(self) -> int:
        """Pages written since the last freeze."""
        return int(lib.zb_space_dirty(self._handle))

    @property
    def error(self) -> int:
        """The errno that a write of this generation met, or 0."""
        return int(lib.zb_space_error(self._handle))

    def fail(self, error: int) -> None:
        """Have the generation count as failed, by a (positive) errno: it can only be discarded."""
        lib.zb_space_fail(self._handle, error)

    def set_limit(self, size: int) -> None:
        """The file's size in bytes: growing write units stop there."""
        lib.zb_space_limit(self._handle, size)

    # -- changes

    def drop(self, lo: int, hi: int, *, holes_only: bool = False) -> None:
        """Make the clean pages of the blocks that touch [lo, hi) absent."""
        flags = lib.ZB_DROP_HOLES if holes_only else 0
        check(lib.zb_drop(self._handle, lo, hi, flags), "drop pages")

    def resume(self, file: str) -> bool:
        """Have the next generation go on in the last file of the one before, whose path this is; whether it will."""
        number = file.removeprefix(f"{self._place[0]}/{self._prefix}-")
        return number.isdecimal() and lib.zb_resume(self._handle, int(number)) == 0

    def freeze(self) -> Generation:
        """End the generation. Raises `ScratchError` if a write of it had failed (and freezes nothing)."""
        runs, n = ffi.new("zb_run **"), ffi.new("size_t *")
        first, last = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(lib.zb_freeze(self._handle, runs, n, first, last), "save changes")
        try:
            size = n[0] * RUN.itemsize
            table = np.frombuffer(bytes(ffi.buffer(runs[0], size)) if size else b"", RUN)
        finally:
            lib.zb_runs_free(runs[0])
        return Generation(table, int(first[0]), self._paths(first[0], last[0]))

    def discard(self) -> list[str]:
        """Forget the generation; returns the scratch files, which are to be removed."""
        first, last = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(lib.zb_discard(self._handle, first, last), "discard changes")
        self.lost.clear()
        return self._paths(first[0], last[0])

    def _paths(self, first: int, last: int) -> list[str]:
        return [os.path.join(self._place[0], f"{self._prefix}-{k}") for k in range(first, last)]

    def close(self) -> None:
        """No more service: see ``zb_space_close``."""
        self.closed = True
        lib.zb_space_close(self._handle)


def _forget_scratch(handle: Any, place: list[str]) -> None:
    """Remove the files of changes that nobody will commit. Does nothing in a forked child."""
    first, last = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    if lib.zb_discard(handle, first, last) == 0:
        for k in range(first[0], last[0]):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(place[0], f"{place[1]}-{k}"))
    lib.zb_space_close(handle)


def _end_space(handle: Any, place: list[str], holds: list[Hold]) -> None:
    _forget_scratch(handle, place)
    lib.zb_space_free(handle)
    for hold in holds:
        hold.release()


@atexit.register
def _at_exit() -> None:
    """The spaces that are left stay where they are; others may still use them."""
    for space in list(_spaces.values()):
        _forget_scratch(space._handle, space._place)
