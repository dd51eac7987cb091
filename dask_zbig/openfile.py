"""A file as one connection has it open: where memory and storage meet.

An `OpenFile` knows, for the bytes of one `ZBigFile`, what a connection sees: the committed *base* (the extent
map's leaves, as loaded) and over it the *layers* that this transaction put there: frozen generations of
scratch pages, and segments staged by a cluster. From these it plans what is mapped where, and at commit it
turns the layers into segments (see `dask_zbig.flush`) and splices them into the leaves.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dask_zbig.basemap import BaseMap, Leaf
from dask_zbig.errors import LoadError, WindowError
from dask_zbig.memory._native import BLOCK, PAGE
from dask_zbig.memory.cache import CacheFile
from dask_zbig.memory.loader import ensure_loaders
from dask_zbig.memory.plan import Piece, Source, plan
from dask_zbig.memory.space import Space, StaleFill, Window
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.segment import FileSource, SegmentReader, SegmentRef
from dask_zbig.storage.tree import ZBigFile, on_store, watch
from dask_zbig.trim import compose, trim

if TYPE_CHECKING:
    from dask_zbig.transaction import DataManager

__all__ = ["Layer", "OpenFile", "Owner"]

#: A view loads at most this many leaves (64 GiB) when it is made; loaders do the rest when it is touched.
EAGER_LEAVES = 1024
#: A window that is made for an array leaves room for it to grow, up to this size.
ROOMY = 1 << 45
#: After a commit, changes up to this size stay where they are in memory; and a block that often in a row.
KEEP_BYTES = 256 << 10
MOVES = 64
_END = 1 << 63


class Owner(Protocol):
    """The array whose bytes a file holds."""

    @property
    def nbytes(self) -> int:
        """Its size now."""

    @property
    def granule(self) -> int:
        """Bytes that change together: the size of an element."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Changes of this transaction, not yet in the extent map.

    `extents` refer to `sources`; `refs` has, for each source, the segment it is already, or None for a
    scratch file. `exact`: every byte of it was changed, not just some of each page. `files`: scratch files.
    """

    extents: npt.NDArray[np.void]
    sources: tuple[Source, ...]
    refs: tuple[SegmentRef | None, ...]
    exact: bool
    files: tuple[str, ...] = ()


class OpenFile:
    """See the module. Views may be used from any thread; all else from the connection's.

    Attributes
    ----------
    failure : Exception or None
        Why this transaction must not be committed.
    """

    def __init__(self, file: ZBigFile, owner: Owner, directory: str) -> None:
        self.file = file
        self.owner = owner
        self.manager: DataManager | None = None
        self.reader: SegmentReader | None = None
        self.failure: BaseException | None = None
        self.layers: tuple[Layer, ...] = ()
        self.flushed: tuple[Layer, ...] = ()
        self.local: dict[Any, Source] = {}  # of segments that this transaction made, by SegmentRef.key
        self.space = Space(directory, self)
        self._cache = CacheFile(directory)
        self._lock = threading.RLock()  # of the tables below; never held while anything is loaded
        self._base = BaseMap(file, self._lock, _weakly(self, OpenFile._stale))
        self._superseded: dict[int, Leaf] = {}  # what dirty pages were made from, and is no more
        self._poisoned = ex.no_ranges()
        self._dropped = ex.no_ranges()  # what is to be mapped again when that is possible
        self._filled = ex.no_ranges()  # what was asked for since there are views
        self._merged = False  # whether there came an invalidation between the flush and the end of the commit
        self._moved: dict[int, int] = {}  # blocks of the last small commit: how many in a row
        self._window: Window | None = None
        self._limit = -1
        on_store(file, _weakly(self, OpenFile._before_store))
        watch(file, _weakly(self, OpenFile._stale, 0, _END))

    # -- views

    def view(
        self,
        lo: int,
        hi: int,
        position: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...],
    ) -> npt.NDArray[Any]:
        """An ndarray onto bytes [lo, hi), what is at hand of them mapped already."""
        self.enter()
        window = self._window_for(lo, hi)
        if window.absent(lo, hi) < hi:
            self.fill(lo, hi)
        window.saw(hi - lo)
        return window.view(position, shape, dtype, strides, self.writeable)

    @property
    def writeable(self) -> bool:
        """Whether changes could be committed."""
        return self.manager is None or self.manager.writeable

    def enter(self) -> None:
        """What every use of the array begins with."""
        self.space.check_process()
        ensure_loaders()
        if self.manager is not None:
            self.manager.join()
        size = self.owner.nbytes
        if size != self._limit:
            self.space.set_limit(size)
            self._limit = size

    def _window_for(self, lo: int, hi: int) -> Window:
        window = self._window
        if window is not None and window.start <= lo and hi <= window.stop:
            return window
        for other in self.space.windows():
            if other.start <= lo and hi <= other.stop:
                self._window = other
                return other
        size = max(hi, self.owner.nbytes)
        if size <= ROOMY:
            try:
                self._window = self.space.window(0, min(max(2 * size, BLOCK), ROOMY))
                return self._window
            except WindowError:
                pass  # there may still be room for what is asked
        try:
            self._window = self.space.window(lo, hi - lo)
        except WindowError as e:
            raise WindowError(f"a view of {hi - lo} bytes does not fit into the address space: {e}") from e
        return self._window

    # -- filling

    def fill(self, lo: int, hi: int, *, local_only: bool = True) -> None:
        """Map what is absent of [lo, hi), in the connection's thread.

        Parameters
        ----------
        local_only : bool
            Leave out what a server would have to be asked for, and what many leaves would have to be loaded
            for: a loader brings it when it is touched.

        Raises
        ------
        LoadError
            Not with `local_only`, which leaves out what cannot be loaded as well.
        """
        with self._lock:
            self._filled = ex.union(self._filled, ex.one_range(lo, hi))
        while True:
            try:
                upto = self.resolve(lo, hi, EAGER_LEAVES if local_only else None)
                self._map(lo, min(upto, hi), local_only)
                return
            except StaleFill:
                continue
            except LoadError:
                if local_only:
                    return
                raise

    def prefetch(self, lo: int, hi: int) -> None:
        """Map all of [lo, hi) now. Raises `LoadError`."""
        self.enter()
        if self._window_for(lo, hi).absent(lo, hi) < hi:
            self.fill(lo, hi, local_only=False)

    def serve(self, lo: int, hi: int, recheck: bool) -> None:
        """For loaders: fill the blocks [lo, hi), and the rest of their leaf if that is at hand."""
        self._resolve_elsewhere(lo, hi)
        if recheck:
            for source in self._sources(lo, hi):
                check = getattr(source, "recheck", None)
                if check is not None:
                    check()
        self._map(lo, hi, False)

    def failed(self, lo: int, hi: int, error: BaseException) -> None:
        """For loaders: the blocks become 0xFF; the transaction is doomed."""
        with self._lock:
            self.failure = self.failure or error
            self._poisoned = ex.union(self._poisoned, ex.one_range(lo, hi))

    def _map(self, lo: int, hi: int, local_only: bool) -> None:
        if lo >= hi:
            return
        while True:
            epoch = self.space.epoch
            try:
                for window in self.space.windows():
                    self._map_in(window, epoch, max(lo, window.start), min(hi, window.stop), local_only)
                return
            except StaleFill:
                if len(self._base.missing(lo, hi)):
                    raise  # what was resolved is gone: begin again

    def _map_in(self, window: Window, epoch: int, lo: int, hi: int, local_only: bool) -> None:
        while lo < hi:
            start = window.absent(lo, hi)
            if start >= hi:
                return
            stop = min(window.present(start, hi), window.stop)
            for a, b in self._at_hand(start, stop) if local_only else [(start, stop)]:
                rows, sources = self._rows(a, b)
                window.fill(epoch, a, b, rows)
                del sources  # which own the descriptors
            lo = stop

    def _at_hand(self, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """The runs of blocks of [lo, hi) all of whose bytes are local."""
        extents, sources = self.content(lo, hi)
        far = [i for i in ex.used(extents).tolist() if not sources[i].local()]
        remote = extents[np.isin(extents["segment"], far)]
        missing = ex.normalize(
            np.array(
                [(s - s % BLOCK, -(-e // BLOCK) * BLOCK) for s, e in ex.covered(remote).tolist()], np.uint64
            ).reshape(-1, 2)
        )
        yield from ex.subtract(ex.one_range(lo, hi), missing).tolist()

    def _rows(self, lo: int, hi: int) -> tuple[list[tuple[int, int, int, int]], list[Source]]:
        """Plan [lo, hi), compose what must be composed, and give what a window takes; and who owns the files."""
        extents, sources = self.content(lo, hi)
        return [self._row(p, extents, sources) for p in plan(extents, sources, lo, hi)], sources

    def _row(self, p: Piece, extents: npt.NDArray[np.void], sources: Sequence[Source]) -> tuple[int, int, int, int]:
        if p.kind == "hole":
            return (p.start, p.stop, 0, -1)
        if p.kind == "direct":
            fd = sources[p.source].fileno()
            assert fd is not None
            return (p.start, p.stop, p.offset, fd)
        fd, offset = self._cache.add(compose(extents, sources, p.start, p.stop))
        return (p.start, p.stop, offset, fd)

    # -- what the bytes are

    def content(
        self, lo: int, hi: int, *, base_only: bool = False, layers: tuple[Layer, ...] | None = None
    ) -> tuple[npt.NDArray[np.void], list[Source]]:
        """Extents of [lo, hi) and their sources, as far as resolved: the base, and over it the layers."""
        with self._lock:
            extents, sources = self._base.extents(lo, hi, self.source)
            over = () if base_only else self.layers if layers is None else layers
        for layer in over:
            new = ex.clip(layer.extents, lo, hi)
            shift = np.arange(len(layer.sources)) + len(sources)
            extents = ex.splice(extents, ex.renumber(new, shift))
            sources.extend(layer.sources)
        return extents, sources

    def source(self, ref: SegmentRef) -> Source:
        """Where the bytes of a segment can be read."""
        found = self.local.get(ref.key)
        if found is not None:
            return found
        if self.reader is None:
            raise LoadError(f"segment {ref.key!r} belongs to no database")
        return self.reader.source(ref)

    def _sources(self, lo: int, hi: int) -> list[Source]:
        extents, sources = self.content(lo, hi)
        return [sources[i] for i in ex.used(extents).tolist()]

    # -- resolving: loading leaves

    def resolve(self, lo: int, hi: int, bound: int | None = None) -> int:
        """Load the leaves of [lo, hi), `bound` at most; returns how far they are known."""
        return self._base.resolve(lo, hi, bound)

    def _resolve_elsewhere(self, lo: int, hi: int) -> None:
        """As `resolve`, for loaders, which must not use the connection: by another one, at its snapshot."""
        missing = self._base.missing(lo, hi)
        if not len(missing):
            return
        epoch = self.space.epoch
        if self.manager is None:
            raise LoadError("the array has not been stored")
        with self.manager.snapshot_connection() as other:
            found = BaseMap.leaves_of(other.get(self.file._p_oid), missing)
        with self._lock:
            if self.space.epoch != epoch:
                raise StaleFill
            self._base.borrow(missing, found)

    # -- boundaries

    def _stale(self, lo: int, hi: int) -> None:
        """An invalidation: what is known of [lo, hi) is no longer true. Loads nothing."""
        with self._lock:
            self._merged = self._merged or bool(self.flushed)
            dirty = bool(self.layers or self.space.dirty_pages)
            for index, old in self._base.forget(lo, hi).items():
                if dirty:
                    self._superseded.setdefault(index, old)
            self._dropped = ex.union(self._dropped, ex.one_range(lo, hi))
            self.space.drop(lo, hi)

    def boundary(self) -> None:
        """The connection has moved to a new snapshot: forget what nobody told us about, map again."""
        for lo, hi in self._base.give_back():
            self._stale(lo, hi)
        if self._superseded:
            self._reconcile()
        self._refill()

    def _reconcile(self) -> None:
        """Pages were written after the last transaction ended, and now the next one begins at another base.

        Reduce them to the bytes that were changed: these lie over the new base, unless that changed them too.
        """
        self.freeze()
        with self._lock:
            now, self._superseded = dict(self._superseded), {}
        for index, old in now.items():
            lo, hi = index * LEAF_BYTES, (index + 1) * LEAF_BYTES
            self.resolve(lo, hi)
            new = self._base.leaf(index)
            theirs = ex.diff(old.extents, [r.key for r in old.refs], new.extents, [r.key for r in new.refs])
            base, sources = old.part(lo, hi, self.source)
            layers = []
            for layer in self.layers:
                inside = ex.clip(layer.extents, lo, hi)
                if not layer.exact:
                    inside = trim(inside, layer.sources, base, sources, self.owner.granule)
                if len(ex.intersect(ex.covered(inside), theirs)):
                    from ZODB.POSException import ConflictError

                    self.failure = ConflictError(
                        f"bytes of an array that were changed before the transaction began (in {lo}..{hi}) were "
                        f"changed by another transaction too"
                    )
                rest = ex.cut(layer.extents, lo, hi)
                layers.append(replace(layer, extents=ex.splice(rest, inside)))
            self.layers = tuple(layers)
            self._dropped = ex.union(self._dropped, ex.one_range(lo, hi))
            self.space.drop(lo, hi)

    def _refill(self) -> None:
        """Map again, for the views that live, what was dropped: system calls on them cannot fault."""
        with self._lock:
            again = ex.intersect(self._dropped, self._filled)
            self._dropped = ex.no_ranges()
        if all(w.idle for w in self.space.windows()):
            with self._lock:
                self._filled = ex.no_ranges()
            return
        for lo, hi in again.tolist():
            with contextlib.suppress(LoadError, OSError):  # a loader tries again, and reports
                self.fill(lo, hi)

    def rest(self) -> None:
        """Between transactions: nothing of a window that nobody looks at need stay resident."""
        for window in self.space.windows():
            if window.idle:
                window.release()

    # -- changes

    @property
    def dirty(self) -> bool:
        """Whether there is anything to commit, or a reason not to."""
        return bool(self.layers or self.flushed or self.failure or self.space.error or self.space.dirty_pages)

    def freeze(self) -> None:
        """Turn the pages written so far into a layer."""
        if not self.space.dirty_pages and not self.space.error:
            return
        with self._lock:  # a fill is planned before both, and then is stale, or after both
            generation = self.space.freeze()
            files = generation.files
            numbers = sorted(set(generation.runs["file"].tolist()))
            index = {n: i for i, n in enumerate(numbers)}
            sources = tuple(FileSource(files[n - generation.first_file]) for n in numbers)
            rows = [(a, b, index[f], o) for a, b, o, f in generation.runs.tolist()]
            self.push(Layer(ex.make(rows), sources, (None,) * len(sources), False, tuple(files)))

    def push(self, layer: Layer) -> None:
        """Put a layer on top. The mapping of its bytes must be right already, or be dropped by the caller."""
        with self._lock:
            self.layers = (*self.layers, layer)

    def overlay(self, layer: Layer) -> None:
        """Put a layer on top whose bytes are not mapped yet."""
        self.freeze()
        self.push(layer)
        self._forget_mapped(ex.covered(layer.extents))

    def truncate(self, size: int) -> None:
        """Cut off everything from byte `size` on, of base and layers."""
        self.freeze()
        self._cut_layers(size)
        self.file.truncate(size)
        self._base.forget(size, _END)
        self._forget_mapped(ex.one_range(size, _END))

    def clear_beyond(self, size: int) -> None:
        """Forget uncommitted bytes from `size` on: an old, longer view may have written there."""
        if not self.space.dirty_pages and not self.layers:
            return
        self.freeze()
        if any(len(ex.clip(layer.extents, size, _END)) for layer in self.layers):
            self._cut_layers(size)
            self._forget_mapped(ex.one_range(size, _END))

    def _cut_layers(self, size: int) -> None:
        with self._lock:
            self.layers = tuple(replace(k, extents=ex.clip(k.extents, 0, size)) for k in self.layers)

    def _forget_mapped(self, ranges: npt.NDArray[np.uint64]) -> None:
        for lo, hi in ranges.tolist():
            self.space.drop(lo, hi)
        with self._lock:
            self._dropped = ex.union(self._dropped, ranges)
        self._refill()

    # -- the end of a transaction

    def spliced(self, indices: Iterable[int]) -> None:
        """These leaves have just got new content from us: it is in memory already."""
        with self._lock:
            for index in indices:
                self._base.adopt(index, self.file.leaf(index))
            self.flushed += self.layers
            self.layers = ()

    def settle(self) -> None:
        """The commit is done: what was written is the base now."""
        flushed, self.flushed = self.flushed, ()
        merged, self._merged = self._merged, False  # if so, our pages lack what others committed
        self.local.clear()
        for layer in flushed:
            left = [f for f in layer.files if os.path.exists(f)]
            if not left:
                continue  # its scratch files became segments just as they were
            changed = ex.covered(layer.extents)
            # (with several layers one may lie over another)
            if merged or len(flushed) > 1 or not self._keep_pages(layer, changed):
                self._forget_mapped(changed)
            _unlink(left)

    def _keep_pages(self, layer: Layer, changed: npt.NDArray[np.uint64]) -> bool:
        """Move the pages of a small change from its scratch file, which goes, to the cache.

        That is cheaper than to map its blocks anew; now and then we do that nevertheless, because pages that are
        moved one by one take a mapping each.
        """
        blocks = {int(p) // BLOCK for p in changed.ravel()}
        self._moved = {b: self._moved.get(b, 0) for b in blocks}
        aligned = not np.any(layer.extents["start"] % PAGE) and not np.any(layer.extents["stop"] % PAGE)
        often = any(n >= MOVES for n in self._moved.values())
        if not aligned or often or ex.total(changed) > KEEP_BYTES:
            self._moved = {}
            return False
        rows = []
        for start, stop, index, offset in layer.extents.tolist():
            fd, place = self._cache.add(layer.sources[index].read(offset, stop - start))
            rows.append((start, stop, place, fd))
            for b in range(start // BLOCK, (stop - 1) // BLOCK + 1):
                self._moved[b] = self._moved.get(b, 0) + 1
        self.space.remap(rows)
        return True

    def discard(self) -> None:
        """Forget all changes, and what could not be loaded."""
        with self._lock:
            gone, self.layers, self.flushed = self.layers + self.flushed, (), ()
            files = self.space.discard()
            self.failure = None
            self._merged = False
            self.local.clear()
            poisoned, self._poisoned = self._poisoned, ex.no_ranges()
        changed = ex.no_ranges()
        for layer in gone:
            changed = ex.union(changed, ex.covered(layer.extents))
            files += layer.files
        for lo, hi in changed.tolist():  # (leaves that the flush had changed, too, are not what they were)
            self._stale(lo, hi)
        for lo, hi in poisoned.tolist():
            self.space.drop(lo, hi)
        self._superseded.clear()
        _unlink(files)
        self._dropped = ex.one_range(0, _END)  # wherever the pages of the generation were

    def rollback(self, layers: tuple[Layer, ...]) -> None:
        """Back to a savepoint, at which there were these layers."""
        _unlink(self.space.discard())
        kept = {f for layer in layers for f in layer.files}
        for layer in self.layers:
            _unlink(f for f in layer.files if f not in kept)
        with self._lock:
            self.layers = layers
        self._forget_mapped(ex.one_range(0, _END))

    def reset(self) -> None:
        """The array was new and its transaction was aborted: it is empty, and belongs to no database."""
        self.discard()
        self.file.clear()
        self._stale(0, _END)
        self.manager = None
        self.reader = None
        self._base.unwatch()

    def close(self) -> None:
        """The connection is closed: what is mapped stays readable."""
        _unlink(self.space.discard())
        for layer in self.layers:
            _unlink(layer.files)
        self.space.close()
        self.manager = None
        self.reader = None

    def attach(self, manager: DataManager) -> None:
        """The array has got a connection."""
        self.manager = manager
        self.reader = manager.reader
        if not self.space.dirty_pages:
            self.space.move_scratch(manager.scratch)

    def _before_store(self, jar: Any) -> None:
        from dask_zbig.transaction import store_new

        store_new(self, jar)


def _weakly(target: OpenFile, method: Any, *args: Any) -> Callable[..., None]:
    ref = weakref.ref(target)

    def call(*more: Any) -> None:
        alive = ref()
        if alive is not None:
            method(alive, *args, *more)

    return call


def _unlink(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
