"""A file's bytes in memory: its windows, and filling them by what the bytes are.

`Mapping` does not know where bytes come from or change. Its owner tells, as extents and sources (`Content`), and
drops what is no longer true.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from ZODB.POSException import POSError

from dask_zbig.descriptors import Descriptor
from dask_zbig.distinct import among
from dask_zbig.errors import WindowError, ZBigError
from dask_zbig.memory._native import BLOCK
from dask_zbig.memory.cache import CacheFile
from dask_zbig.memory.plan import Piece, Source, batches, composed, plan
from dask_zbig.memory.space import Service, Space, StaleFill, Window
from dask_zbig.storage import extents as ex
from dask_zbig.trim import compose

__all__ = ["Content", "Mapping"]

_log = logging.getLogger(__name__)

#: A window that is made for an array leaves room for it to grow, up to this size.
ROOMY = 1 << 45
#: After a small commit pages stay where they are, each taking a mapping, this often in a row in one block.
KEPT = 64
#: Files that are mapped at once: each takes a descriptor meanwhile, in every thread that maps.
AT_ONCE = 32
#: Bytes that are composed at once: so much memory it takes, and a processor's cache still has them.
COMPOSED = 4 << 20
#: Bytes that are composed in a transaction before they are touched. Of an array that is in very many pieces all would
#: be copied when it is viewed.
EAGER = 16 << 20


class Content(Service, Protocol):
    """What a mapping asks of its owner. `content` and `missing` may be called from any thread."""

    def content(self, lo: int, hi: int) -> tuple[ex.Extents, list[Source]]:
        """What is known of the bytes [lo, hi)."""

    def missing(self, lo: int, hi: int) -> ex.Ranges:
        """The part of [lo, hi) of which nothing is known (any more)."""

    def fill(self, lo: int, hi: int) -> None:
        """Map what is at hand of [lo, hi)."""


class Mapping:
    """See the module. Thread-safe, but windows are made by the connection's thread.

    Parameters
    ----------
    directory : str
        For scratch and cache files.
    owner : Content
        Held weakly by the space, and by us for as long as we live.
    """

    def __init__(self, directory: str, owner: Content) -> None:
        self.space = Space(directory, owner)
        self._cache = CacheFile(directory)
        self._lock = threading.Lock()
        self._dropped = ex.no_ranges()  # what is to be mapped again when that is possible
        self._filled = ex.no_ranges()  # what was asked for since there are views
        self._kept: dict[int, int] = {}  # blocks of the last small commit: how many in a row
        self._window: Window | None = None
        self._eager = EAGER  # what is left of it

    # -- windows

    def window(self, lo: int, hi: int, size: int) -> Window:
        """A window onto [lo, hi) of a file that has `size` bytes now. Raises `WindowError`."""
        window = self._window
        if window is not None and window.start <= lo and hi <= window.stop:
            return window
        for other in self.space.windows():
            if other.start <= lo and hi <= other.stop:
                self._window = other
                return other
        size = max(hi, size)
        if size <= ROOMY:
            with contextlib.suppress(WindowError):  # there may still be room for what is asked
                self._window = self.space.window(0, min(max(2 * size, BLOCK), ROOMY))
                return self._window
        self._window = None  # (if nobody looks at it, there is more room)
        try:
            self._window = self.space.window(lo, hi - lo)
        except WindowError as e:
            raise WindowError(f"a view of {hi - lo} bytes does not fit into the address space: {e}") from e
        return self._window

    @property
    def present(self) -> Window | None:
        """The window that was asked for last."""
        return self._window

    def rest(self) -> None:
        """Between transactions: nothing of a window that nobody looks at need stay resident."""
        self._eager = EAGER
        for window in self.space.windows():
            if window.idle:
                window.release()

    @property
    def watched(self) -> bool:
        """Whether a view is alive."""
        return not all(w.idle for w in self.space.windows())

    # -- filling

    def asked(self, lo: int, hi: int) -> None:
        """[lo, hi) is being looked at."""
        with self._lock:
            self._filled = ex.union(self._filled, ex.one_range(lo, hi))

    def map(self, owner: Content, lo: int, hi: int, local_only: bool) -> None:
        """Map what is absent of [lo, hi) in every window.

        With `local_only`, as far as no server must be asked and not more than `EAGER` bytes must be composed: by the
        connection's thread.

        Raises
        ------
        StaleFill
            If the owner has lost what it knew of these bytes.
        """
        while lo < hi:
            epoch = self.space.epoch
            if len(owner.missing(lo, hi)):  # (forgotten since the caller looked; what is not known looks like a hole)
                raise StaleFill
            try:
                for window in self.space.windows():
                    self._map_in(owner, window, epoch, max(lo, window.start), min(hi, window.stop), local_only)
                return
            except StaleFill:
                continue

    def _map_in(self, owner: Content, window: Window, epoch: int, lo: int, hi: int, local_only: bool) -> None:
        while lo < hi:
            start = window.absent(lo, hi)
            if start >= hi:
                return
            stop = min(window.present(start, hi), window.stop)
            extents, sources = owner.content(start, stop)
            for a, b in _at_hand(extents, sources, start, stop) if local_only else [(start, stop)]:
                self._map_run(ex.clip(extents, a, b), sources, window, epoch, a, b, local_only)
            lo = stop

    def _map_run(
        self, extents: ex.Extents, sources: Sequence[Source], window: Window, epoch: int, lo: int, hi: int, eager: bool
    ) -> None:
        if eager:
            upto = self._affordable(extents, sources, hi)
            extents, hi = ex.clip(extents, lo, upto), upto
            if lo >= hi:
                return
        for a, b, some in batches(plan(extents, sources, lo, hi), lo, hi, AT_ONCE):
            files: list[Descriptor] = []  # open until they are mapped
            rows = [row for p in some for row in self._rows(p, extents, sources, files)]
            window.fill(epoch, a, b, rows)

    def _affordable(self, extents: ex.Extents, sources: Sequence[Source], hi: int) -> int:
        """Where the blocks end that can be mapped without composing more than is left of `EAGER`."""
        costs = np.cumsum(composed(extents, sources))
        first = int(np.searchsorted(costs, self._eager, "right"))
        self._eager -= int(costs[first - 1]) if first else 0
        return hi if first == len(extents) else int(extents["start"][first]) // BLOCK * BLOCK

    def _rows(
        self, p: Piece, extents: ex.Extents, sources: Sequence[Source], files: list[Descriptor]
    ) -> Iterator[tuple[int, int, int, int]]:
        if p.kind == "hole":
            yield p.start, p.stop, 0, -1
        elif p.kind == "direct":
            file = sources[p.source].descriptor()
            assert file is not None
            files.append(file)
            yield p.start, p.stop, p.offset, file.fd
        else:
            for start in range(p.start, p.stop, COMPOSED):
                stop = min(start + COMPOSED, p.stop)
                fd, offset = self._cache.add(compose(extents, sources, start, stop))
                yield start, stop, offset, fd

    # -- dropping

    def drop(self, ranges: ex.Ranges) -> None:
        """The bytes are not what they were: unmap them, and note them for `refill`."""
        with self._lock:
            self._dropped = ex.union(self._dropped, ranges)
        for lo, hi in ranges.tolist():
            self.space.drop(lo, hi)

    def note_dropped(self, ranges: ex.Ranges) -> None:
        """As `drop`, for what is unmapped already."""
        with self._lock:
            self._dropped = ex.union(self._dropped, ranges)

    def refill(self, owner: Content) -> None:
        """Map again, for the views that live, what was dropped: system calls on them cannot fault."""
        watched = self.watched
        with self._lock:
            if watched and not len(self._dropped):
                return
            again = ex.intersect(self._dropped, self._filled)
            self._dropped = ex.no_ranges()
            if not watched:
                self._filled = ex.no_ranges()
        for lo, hi in again.tolist() if watched else ():
            try:
                owner.fill(lo, hi)
            except (ZBigError, OSError, POSError) as e:  # a loader tries again, when it is touched, and reports
                _log.warning("bytes %d..%d of %r cannot be mapped now: %s", lo, hi, owner, e)

    # -- keeping

    def keeps(self, extents: Sequence[tuple[int, int, int, int]]) -> bool:
        """Whether pages that were written are to stay where they are, which takes mappings each time.

        That is cheaper than to map their blocks anew. But now and then, in blocks where it happens again and again, we
        refuse.
        """
        blocks = {at // BLOCK for start, stop, *_ in extents for at in (start, stop)}
        self._kept = {b: self._kept.get(b, 0) for b in blocks}
        if any(n >= KEPT for n in self._kept.values()):
            self._kept = {}
            return False
        for start, stop, *_ in extents:
            for b in range(start // BLOCK, (stop - 1) // BLOCK + 1):
                self._kept[b] = self._kept.get(b, 0) + 1
        return True


def _at_hand(extents: ex.Extents, sources: Sequence[Source], lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """The runs of blocks of [lo, hi) all of whose bytes are local."""
    far = [i for i in ex.used(extents).tolist() if not sources[i].local()]
    if not far:
        yield lo, hi
        return
    remote = ex.covered(extents[among(extents["segment"], far)])
    outward: npt.NDArray[Any] = remote.copy()
    outward[:, 0] -= outward[:, 0] % BLOCK
    outward[:, 1] += -outward[:, 1] % np.uint64(BLOCK)
    yield from ex.subtract(ex.one_range(lo, hi), ex.normalize(outward)).tolist()
