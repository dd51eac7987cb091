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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from ZODB.POSException import ConflictError

from dask_zbig.ahead import ALL, LAZY, bring, bring_writable
from dask_zbig.basemap import HOLE, BaseMap, Leaf
from dask_zbig.distinct import among
from dask_zbig.errors import ClosedError, LoadError
from dask_zbig.mapping import Mapping
from dask_zbig.memory._native import PAGE, check, lib, start
from dask_zbig.memory.fastpath import FastPath
from dask_zbig.memory.loader import ensure_loaders
from dask_zbig.memory.plan import Source
from dask_zbig.memory.space import Generation, StaleFill
from dask_zbig.signals import ctrl_c_postponed
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.reader import SegmentReader
from dask_zbig.storage.segment import SegmentRef
from dask_zbig.storage.sources import FileSource
from dask_zbig.storage.tree import ZBigFile, on_store, watch
from dask_zbig.trim import trim

if TYPE_CHECKING:
    from dask_zbig.transaction import DataManager

__all__ = ["Layer", "OpenFile", "Owner", "State"]

#: A view loads at most this many leaves (64 GiB) when it is made; loaders do the rest when it is touched.
EAGER_LEAVES = 1024
#: After a commit, changes up to this size stay where they are in memory.
KEEP_BYTES = 256 << 10
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
    `written`: where every byte was, at once, without a look at what it had been.
    """

    extents: ex.Extents
    sources: tuple[Source, ...]
    refs: tuple[SegmentRef | None, ...]
    exact: bool
    files: tuple[str, ...] = ()
    written: ex.Ranges = field(default_factory=ex.no_ranges)


#: What a savepoint remembers of a file: its layers, and where it was truncated.
State: TypeAlias = tuple[tuple[Layer, ...], int | None]


class OpenFile:
    """See the module. Views may be used from any thread; all else from the connection's.

    Attributes
    ----------
    failure : Exception or None
        Why this transaction must not be committed.
    turn : RLock
        Held while a view is made, which uses the connection: several threads may slice an array (Dask's do). No
        managed memory is touched meanwhile. Shared by all files of a connection.
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
        self.mapping = Mapping(directory, self)
        self.space = self.mapping.space
        self.turn = threading.RLock()
        self._lock = threading.RLock()  # of the tables below; no leaf is loaded while it is held
        self._base = BaseMap(file, self._lock, _weakly(self, OpenFile._stale))
        self._superseded: dict[int, Leaf] = {}  # what dirty pages were made from, and is no more;
        self._were_known = ex.no_ranges()  # in these ranges, where there was no leaf they were made from a hole
        self._poisoned = ex.no_ranges()
        self._written = ex.no_ranges()  # see Layer, of the generation
        self._heard: list[tuple[int, int]] = []  # what becomes stale when the connection has moved
        self._cut: int | None = None  # where this transaction has truncated the file, at the lowest
        self._merged = False  # whether there came an invalidation between the flush and the end of the commit
        self._limit = -1
        self._entered = 0  # the process in which `enter` has nothing to do any more
        self._path: FastPath | None = None
        self._longest = 0  # that the array was when views were made
        self._scratch: FileSource | None = None  # the file in which the next generation goes on
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
        most: int = LAZY,
    ) -> npt.NDArray[Any]:
        """An ndarray onto bytes [lo, hi), what is at hand of them mapped already; `most`: see `ahead.bring`."""
        with self.turn:
            self.enter()
            window = self.mapping.window(lo, hi, self._limit)
            bring(self, window, lo, hi, most)
            window.saw(hi - lo)
            return window.view(position, shape, dtype, strides, self.writeable)

    @property
    def writeable(self) -> bool:
        """Whether changes could be committed."""
        return self.manager is None or self.manager.writeable

    def enter(self) -> None:
        """What every use of the array begins with."""
        if self._entered == os.getpid():
            check(lib.zb_handlers(), "install the SIGSEGV handler")
            return
        self.space.check_process()
        start()
        ensure_loaders()
        if self.manager is not None:
            self.manager.join()
        size = self.owner.nbytes
        if size != self._limit:
            self.space.set_limit(size)
            self._limit = size
            self._longest = max(size, self._longest)
        if self.manager is not None and self.manager.joined:
            self._entered = os.getpid()

    def short(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FastPath | None:
        """A short way to the rows of the array, in C order, if there can be one; good until `cool`."""
        window, size = self.mapping.present, self.owner.nbytes
        if not (self._entered and shape and size and window is not None and window.start == 0 and size <= window.stop):
            return None
        self._path = FastPath(window, shape, dtype, self.writeable)
        return self._path

    def cool(self) -> None:
        """The transaction ends, or the shape changes: what `enter` found out is to be looked at again."""
        self._entered = 0
        if self._path is not None:
            self._path.cut()
            self._path = None

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
        self.mapping.asked(lo, hi)
        while True:
            try:
                upto = self.resolve(lo, hi, EAGER_LEAVES if local_only else None)
                self._expect(lo, min(upto, hi))
                self.mapping.map(self, lo, min(upto, hi), local_only)
                return
            except StaleFill:
                continue
            except LoadError:
                if local_only:
                    return
                raise

    def prefetch(self, lo: int, hi: int, most: int = ALL, *, writable: bool = False) -> None:
        """Map [lo, hi) now: see `ahead.bring`; with `writable`, see `ahead.bring_writable`."""
        with self.turn:
            self.enter()
            window = self.mapping.window(lo, hi, self._limit)
            if writable:
                bring_writable(self, window, lo, hi)
            else:
                bring(self, window, lo, hi, most)

    def lacks(self, lo: int, hi: int) -> bool:
        """Whether something of [lo, hi) is not mapped yet."""
        return self.mapping.window(lo, hi, self._limit).absent(lo, hi) < hi

    def serve(self, lo: int, hi: int, recheck: bool) -> None:
        """For loaders: fill the blocks [lo, hi)."""
        self._resolve_elsewhere(lo, hi)
        if recheck:
            self.recheck(lo, hi)
        self._expect(lo, hi)
        self.mapping.map(self, lo, hi, False)

    def _expect(self, lo: int, hi: int) -> None:
        reader = self.reader  # (another thread may close the connection)
        if reader is not None and reader.expects:
            reader.expect(self._base.refs(lo, hi))

    def recheck(self, lo: int, hi: int) -> None:
        """Raise `LoadError` if a file that bytes of [lo, hi) come from is shorter than it was."""
        extents, sources = self.content(lo, hi)
        for i in ex.used(extents).tolist():
            check = getattr(sources[i], "recheck", None)
            if check is not None:
                check()

    def failed(self, lo: int, hi: int, error: BaseException) -> None:
        """For loaders: the blocks become 0xFF; the transaction is doomed."""
        with self._lock:
            self.failure = self.failure or error
            self._poisoned = ex.union(self._poisoned, ex.one_range(lo, hi))
        if self._path is not None:
            self._path.cut()  # which shows what is mapped; it is for others to tell that this is not to be read

    def poisoned(self, lo: int, hi: int) -> ex.Ranges:
        """The part of [lo, hi) that could not be loaded and is 0xFF."""
        with self._lock:
            return ex.intersect(self._poisoned, ex.one_range(lo, hi))

    def remote(self, lo: int, hi: int) -> int:
        """How many bytes of [lo, hi) a server must be asked for; very many, if there are too many leaves to know."""
        if self.resolve(lo, hi, EAGER_LEAVES) < hi:
            return _END
        extents, sources = self.content(lo, hi)
        far = [i for i in ex.used(extents).tolist() if not sources[i].local()]
        return ex.total(ex.covered(extents[among(extents["segment"], far)]))

    # -- what the bytes are

    def content(self, lo: int, hi: int, *, base_only: bool = False) -> tuple[ex.Extents, list[Source]]:
        """Extents of [lo, hi) and their sources, as far as resolved: the base, and over it the layers."""
        with self._lock:
            extents, sources = self._base.extents(lo, hi, self.source)
            over = () if base_only else self.layers
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

    # -- resolving: loading leaves

    def resolve(self, lo: int, hi: int, bound: int | None = None) -> int:
        """Load the leaves of [lo, hi), `bound` at most; returns how far they are known."""
        return self._base.resolve(lo, hi, bound)

    def missing(self, lo: int, hi: int) -> ex.Ranges:
        """The part of [lo, hi) whose leaves are not known."""
        return self._base.missing(lo, hi)

    def _resolve_elsewhere(self, lo: int, hi: int) -> None:
        """As `resolve`, for loaders, which must not use the connection: by another one, at its snapshot."""
        while len(missing := self._base.missing(lo, hi)):
            epoch, manager = self.space.epoch, self.manager
            snapshot = None if manager is None else manager.snapshot
            if self.file._p_jar is None:  # it is in no database, and nothing of it needs loading
                found = BaseMap.leaves_of(self.file, missing)
            elif manager is None:
                raise ClosedError("the connection of this array is closed")
            else:
                with manager.snapshot_connection() as other:
                    found = BaseMap.leaves_of(other.get(self.file._p_oid), missing)
            with self._lock:
                if self.space.epoch != epoch:
                    raise StaleFill
                if manager is not None and manager.snapshot != snapshot:
                    continue  # that was of the transaction before
                if self._cut is not None:  # which the other connection does not see
                    end = self._cut
                    found = {i: Leaf(ex.clip(leaf.extents, 0, end), leaf.refs) for i, leaf in found.items()}
                self._base.borrow(missing, found)

    # -- boundaries

    def _stale(self, lo: int, hi: int) -> None:
        """An invalidation: what is known of [lo, hi) is no longer true. Loads nothing."""
        if self.manager is not None and self.manager.moves:
            self._heard.append((lo, hi))
            return
        with self._lock:
            self._merged = self._merged or bool(self.flushed)
            forgotten, known = self._base.forget(lo, hi)
            self.mapping.drop(ex.one_range(lo, hi))
            if self.layers or self.space.dirty_pages:  # (none is made of what was dropped any more)
                for index, old in forgotten.items():
                    at = index * LEAF_BYTES
                    if not len(ex.intersect(self._were_known, ex.one_range(at, at + LEAF_BYTES))):
                        self._superseded[index] = old
                self._were_known = ex.union(self._were_known, known)

    def moved(self) -> None:
        """The connection has moved to another snapshot, or has tried: what it heard of is stale now."""
        self._cut = None  # a transaction that did nothing else was not dirty, and nobody has told us of its end
        heard, self._heard = self._heard, []
        for lo, hi in heard:
            self._stale(lo, hi)

    def boundary(self) -> None:
        """The connection has moved to a new snapshot: forget what nobody told us about, map again."""
        for lo, hi in self._base.give_back():
            self._stale(lo, hi)
        if len(self._were_known):
            self._reconcile()
        self.mapping.refill(self)

    def _reconcile(self) -> None:
        """Pages were written after the last transaction ended, and now the next one begins at another base.

        Reduce them to the bytes that were changed: these lie over the new base, unless that changed them too.
        """
        for index in list(self._superseded):
            self.resolve(index * LEAF_BYTES, (index + 1) * LEAF_BYTES)
        with self._lock:  # no loader shall show whole pages over the new base: they would be written to, and kept
            self.freeze()
            now, self._superseded = self._superseded, {}
            known, self._were_known = self._were_known, ex.no_ranges()
            changed = [ex.intersect(ex.covered(layer.extents), known) for layer in self.layers]
            for index in sorted({i for ranges in changed for i in _leaves_in(ranges)}):
                self._reduce(index, now.get(index, HOLE))

    def _reduce(self, index: int, old: Leaf) -> None:
        lo, hi = index * LEAF_BYTES, (index + 1) * LEAF_BYTES
        self.resolve(lo, hi)  # (done already, but where there was no leaf)
        new = self._base.leaf(index)
        if not len(old.extents) and not len(new.extents):
            return
        theirs = ex.diff(old.extents, [r.key for r in old.refs], new.extents, [r.key for r in new.refs])
        base, sources = old.part(lo, hi, self.source)
        layers = []
        for layer in self.layers:
            inside = ex.clip(layer.extents, lo, hi)
            if not layer.exact:
                inside = trim(inside, layer.sources, base, sources, self.owner.granule)
            if len(ex.intersect(ex.covered(inside), theirs)):
                self.failure = ConflictError(
                    f"bytes of an array that were changed before the transaction began (in {lo}..{hi}) were "
                    f"changed by another transaction too"
                )
            rest = ex.cut(layer.extents, lo, hi)
            layers.append(replace(layer, extents=ex.splice(rest, inside)))
        self.layers = tuple(layers)
        self.mapping.drop(ex.one_range(lo, hi))

    # -- changes

    @property
    def dirty(self) -> bool:
        """Whether there is anything to commit, or a reason not to."""
        return bool(self.layers or self.flushed or self.failure or self.space.error or self.space.dirty_pages)

    def freeze(self) -> None:
        """Turn the pages written so far into a layer."""
        if not self.space.dirty_pages and not self.space.error:
            return
        # A fill is planned before both, and then is stale, or after both. And Ctrl-C comes before both, or after.
        with ctrl_c_postponed(), self._lock:
            generation = self.space.freeze()
            try:
                self.push(_layer_of(generation, self._written, self._scratch))
                self._scratch = None
                self._written = ex.no_ranges()
            except BaseException as e:  # it is in no layer: it can only be forgotten
                self.failure = self.failure or e
                self._poisoned = ex.union(self._poisoned, ex.normalize(_run_ranges(generation)))
                self._scratch = None
                _unlink(generation.files)
                raise

    def wrote(self, lo: int, hi: int) -> None:
        """All bytes of [lo, hi) have been assigned, without a look at what they were."""
        with self._lock:
            self._written = ex.union(self._written, ex.one_range(lo, hi))

    def push(self, layer: Layer) -> None:
        """Put a layer on top. The mapping of its bytes must be right already, or be dropped by the caller."""
        with self._lock:
            self.layers = (*self.layers, layer)

    def overlay(self, layer: Layer) -> None:
        """Put a layer on top whose bytes are not mapped yet."""
        self.freeze()
        self.push(layer)
        self._remap(ex.covered(layer.extents))

    def truncate(self, size: int) -> None:
        """Cut off everything from byte `size` on, of base and layers."""
        self.cool()
        self.freeze()
        self._cut_layers(size)
        self._cut = size if self._cut is None else min(size, self._cut)
        self.file.truncate(size)
        self._base.forget(size, _END)
        self._remap(ex.one_range(size, _END))

    def clear_beyond(self, size: int) -> None:
        """Forget uncommitted bytes from `size` on: an old, longer view may have written there."""
        if self._longest <= size:
            return  # (or each append would freeze what the last one wrote, and cost more with every layer)
        if self.space.dirty_pages or self.layers:
            self.freeze()
            if any(len(ex.clip(layer.extents, size, _END)) for layer in self.layers):
                self._cut_layers(size)
                self._remap(ex.one_range(size, _END))
        if not self.mapping.watched:  # there is no longer view any more
            self._longest = size

    def _cut_layers(self, size: int) -> None:
        left = ex.one_range(0, size)
        with self._lock:
            self.layers = tuple(
                replace(k, extents=ex.clip(k.extents, 0, size), written=ex.intersect(k.written, left))
                for k in self.layers
            )

    def _remap(self, ranges: ex.Ranges) -> None:
        self.mapping.drop(ranges)
        self.mapping.refill(self)

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
        local, self.local = self.local, {}
        self._cut = None
        end = self.owner.nbytes
        beyond = self._longest > end and any(_holds_beyond(layer, end) for layer in flushed)
        for layer in flushed:
            left = [f for f in layer.files if os.path.exists(f)]
            if not left:
                continue  # its scratch files became segments just as they were
            # (with several layers one may lie over another)
            if merged or len(flushed) > 1 or not self._keep(layer):
                self._remap(ex.covered(layer.extents))
            elif self._resume(layer):
                continue
            _unlink(left)
        if beyond:
            self._remap(ex.one_range(end, _END))
        _close(local)

    def _keep(self, layer: Layer) -> bool:
        """Leave the pages of a small change where they are in memory, and so in their scratch file."""
        if len(layer.extents) > KEEP_BYTES // PAGE:
            return False
        rows = layer.extents.tolist()
        whole = all(start % PAGE == 0 and stop % PAGE == 0 for start, stop, *_ in rows)
        small = sum(stop - start for start, stop, *_ in rows) <= KEEP_BYTES
        return whole and small and self.mapping.keeps(rows)

    def _resume(self, layer: Layer) -> bool:
        """Have the next small change go into the same scratch file: to make one takes as long as all the rest."""
        source = layer.sources[-1]
        if len(layer.files) != 1 or not isinstance(source, FileSource) or not self.space.resume(layer.files[0]):
            return False
        self._scratch = source
        return True

    def discard(self) -> None:
        """Forget all changes, and what could not be loaded."""
        with self._lock:
            gone, self.layers, self.flushed = self.layers + self.flushed, (), ()
            files = self.space.discard()
            self._scratch = None
            self.failure = None
            self._written = ex.no_ranges()
            self._merged = False
            self._cut = None
            local, self.local = self.local, {}
            poisoned, self._poisoned = self._poisoned, ex.no_ranges()
        changed = ex.no_ranges()
        for layer in gone:
            changed = ex.union(changed, ex.covered(layer.extents))
            files += layer.files
        for lo, hi in changed.tolist():  # (leaves that the flush had changed, too, are not what they were)
            self._stale(lo, hi)
        self.mapping.drop(poisoned)
        self.mapping.note_dropped(ex.one_range(0, _END))  # wherever the pages of the generation were
        self._superseded.clear()
        self._were_known = ex.no_ranges()
        _close(local)
        _unlink(files)

    def state(self) -> State:
        """What a savepoint must remember. Freezes."""
        self.freeze()
        return self.layers, self._cut

    def rollback(self, state: State) -> None:
        """Back to a savepoint at which this was the state."""
        self.cool()
        layers, self._cut = state
        with self._lock:
            gone, self.layers = self.layers, layers
            self._written = ex.no_ranges()
            self.mapping.drop(ex.one_range(0, _END))  # first: no write may copy a page that shows what is undone
            files = self.space.discard()
            self._scratch = None
        kept = {f for layer in layers for f in layer.files}
        _unlink([*files, *(f for layer in gone for f in layer.files if f not in kept)])
        self.mapping.refill(self)

    def reset(self) -> None:
        """The array was new and its transaction was aborted: it is empty, and belongs to no database."""
        self.cool()
        self.discard()
        self.file.clear()
        self._stale(0, _END)
        self.manager = None
        self.reader = None
        self._base.unwatch()
        self.mapping.refill(self)

    def close(self) -> None:
        """The connection is closed: what is mapped stays readable."""
        self.cool()
        _unlink(self.space.discard())
        self._scratch = None
        for layer in self.layers:
            _unlink(layer.files)
        self.space.close()
        self.manager = None
        self.reader = None

    def attach(self, manager: DataManager) -> None:
        """The array has got a connection."""
        self.cool()
        self.manager = manager
        self.turn = manager.turn
        self.reader = manager.reader
        self.space.set_transient(not manager.durable)
        if not self.space.dirty_pages:
            self.space.move_scratch(manager.scratch)

    def _before_store(self, jar: Any) -> None:
        from dask_zbig.transaction import store_new

        store_new(self, jar)


def _leaves_in(ranges: ex.Ranges) -> Iterator[int]:
    """The numbers of the leaves that ranges touch."""
    for lo, hi in ranges.tolist():
        yield from range(lo // LEAF_BYTES, -(-hi // LEAF_BYTES))


def _layer_of(generation: Generation, written: ex.Ranges, resumed: FileSource | None) -> Layer:
    numbers = sorted(set(generation.runs["file"].tolist()))
    index = {n: i for i, n in enumerate(numbers)}
    paths = [generation.files[n - generation.first_file] for n in numbers]
    sources = tuple(
        resumed.grown() if resumed is not None and path == resumed.path else FileSource(path) for path in paths
    )
    rows = [(a, b, index[f], o) for a, b, o, f in generation.runs.tolist()]
    return Layer(ex.make(rows), sources, (None,) * len(sources), False, tuple(generation.files), written)


def _run_ranges(generation: Generation) -> npt.NDArray[np.uint64]:
    return np.stack([generation.runs["start"], generation.runs["stop"]], 1)


def _weakly(target: OpenFile, method: Any, *args: Any) -> Callable[..., None]:
    ref = weakref.ref(target)

    def call(*more: Any) -> None:
        alive = ref()
        if alive is not None:
            method(alive, *args, *more)

    return call


def _holds_beyond(layer: Layer, end: int) -> bool:
    """Whether something was written past the array's end, by an old view that is longer than the array is now."""
    if not len(layer.extents) or layer.extents["stop"][-1] <= end:
        return False
    tail = ex.clip(layer.extents, end, _END)
    if ex.total(ex.covered(tail)) > PAGE:
        return True
    return any(any(layer.sources[i].read(offset, b - a)) for a, b, i, offset in tail.tolist())


def _close(sources: dict[Any, Source]) -> None:
    """Close scratch files that were made segments now: a savepoint that somebody still holds refers to them."""
    for source in sources.values():
        if isinstance(source, FileSource):
            source.close()


def _unlink(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # (it may be a commit that ends here: what is left is swept some day)
            os.unlink(path)
