"""The committed extent map of one file, as far as a connection has loaded it.

Leaves are copied out of the persistent objects when they are loaded, so that loader threads can use them; the
objects are held and watched, so that an invalidation drops exactly the copies that it makes stale.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.memory.plan import Source
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.segment import SegmentRef
from dask_zbig.storage.tree import ZBigFile, checked, load, watch

__all__ = ["HOLE", "BaseMap", "Leaf"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf's content as it was loaded."""

    extents: npt.NDArray[np.void]
    refs: tuple[SegmentRef, ...]

    def part(
        self, lo: int, hi: int, source: Callable[[SegmentRef], Source], first: int = 0
    ) -> tuple[npt.NDArray[np.void], list[Source]]:
        """The extents of [lo, hi), and their sources, numbered from `first`."""
        part = ex.clip(self.extents, lo, hi)
        if len(part) <= ex.FEW:
            places: dict[int, int] = {}
            rows = [(a, b, places.setdefault(i, len(places)) + first, offset) for a, b, i, offset in part.tolist()]
            return np.array(rows, ex.EXTENT), [source(self.refs[i]) for i in places]
        used = ex.used(part)
        mapping = np.zeros(len(self.refs), np.int64)
        mapping[used] = np.arange(len(used)) + first
        return ex.renumber(part, mapping), [source(self.refs[i]) for i in used.tolist()]


#: What a file has where it has no leaf.
HOLE = Leaf(ex.empty(), ())


class BaseMap:
    """See the module.

    Parameters
    ----------
    file
    lock
        That of the tables, shared with whoever plans by them. Never held while anything is loaded.
    on_stale
        Called with (lo, hi) when an invalidation makes those bytes stale. It calls `forget`.
    """

    def __init__(self, file: ZBigFile, lock: threading.RLock, on_stale: Callable[[int, int], None]) -> None:
        self._file = file
        self._lock: Any = lock
        self._on_stale = on_stale
        self._leaves: dict[int, Leaf] = {}
        self._known = ex.no_ranges()  # where `_leaves` has every leaf there is
        self._borrowed = ex.no_ranges()  # the part of it that no invalidation will tell of
        self._watched: dict[int, Any] = {}  # persistent objects, held so that they get invalidations

    # -- reading

    def missing(self, lo: int, hi: int) -> npt.NDArray[np.uint64]:
        """The ranges, of whole leaves, that must be loaded before [lo, hi) is known."""
        with self._lock:
            return ex.subtract(_leaf_range(lo, hi), self._known)

    def leaf(self, index: int) -> Leaf:
        """A known leaf; an empty one where the file has none."""
        with self._lock:
            return self._leaves.get(index, HOLE)

    def refs(self, lo: int, hi: int) -> list[SegmentRef]:
        """The segments of which bytes are known to be in [lo, hi)."""
        first, last = lo // LEAF_BYTES, -(-hi // LEAF_BYTES)
        with self._lock:
            leaves = [leaf for i, leaf in self._leaves.items() if first <= i < last]
        return [leaf.refs[i] for leaf in leaves for i in ex.used(ex.clip(leaf.extents, lo, hi)).tolist()]

    def extents(
        self, lo: int, hi: int, source: Callable[[SegmentRef], Source]
    ) -> tuple[npt.NDArray[np.void], list[Source]]:
        """What is known of [lo, hi)."""
        first, last = lo // LEAF_BYTES, -(-hi // LEAF_BYTES)
        sources: list[Source] = []
        parts = [ex.empty()]
        with self._lock:
            if last - first < len(self._leaves):
                indices: Iterable[int] = (i for i in range(first, last) if i in self._leaves)
            else:
                indices = sorted(i for i in self._leaves if first <= i < last)
            for index in indices:
                if not len(self._leaves[index].extents):
                    continue
                part, more = self._leaves[index].part(lo, hi, source, len(sources))
                parts.append(part)
                sources += more
        return (parts[1] if len(parts) == 2 else np.concatenate(parts, dtype=ex.EXTENT)), sources

    # -- loading, by the connection's thread

    def resolve(self, lo: int, hi: int, bound: int | None = None) -> int:
        """Load the leaves of [lo, hi), `bound` at most; returns how far they are known."""
        if lo // LEAF_BYTES in self._leaves and (hi - 1) // LEAF_BYTES == lo // LEAF_BYTES:
            return hi  # most small reads and commits end here
        count = 0
        for a, b in self.missing(lo, hi).tolist():
            load(self._file)  # (to ask a ghost for a method loads it, with whatever error that may be)
            for node, start, stop in self._file.nodes(a, b):
                self._watch(node, start, stop)
            leaves = list(islice(self._file.leaves(a, b), None if bound is None else bound - count + 1))
            _expect(self._file, leaves)
            for index, leaf in leaves:
                at = index * LEAF_BYTES
                if bound is not None and count >= bound:
                    self._learn(a, at)
                    return at
                self._take(index, leaf)
                count += 1
            self._learn(a, b)
        return hi

    def adopt(self, index: int, leaf: Any) -> None:
        """Take a leaf's present content, and watch it."""
        known = index in self._leaves
        self._take(index, leaf)
        if not known:
            self._learn(index * LEAF_BYTES, (index + 1) * LEAF_BYTES)

    def _take(self, index: int, leaf: Any) -> None:
        checked(leaf, index)  # loads it
        loaded = Leaf(leaf.extents, leaf.refs)
        self._watch(leaf, index * LEAF_BYTES, (index + 1) * LEAF_BYTES)
        with self._lock:
            self._leaves[index] = loaded

    def _learn(self, lo: int, hi: int) -> None:
        with self._lock:
            self._known = ex.union(self._known, ex.one_range(lo, hi))

    def _watch(self, obj: Any, lo: int, hi: int) -> None:
        if id(obj) not in self._watched:
            self._watched[id(obj)] = obj
            watch(obj, partial(self._on_stale, lo, hi))

    def unwatch(self) -> None:
        """Let the persistent objects go."""
        self._watched.clear()

    # -- loading by others

    @staticmethod
    def leaves_of(file: ZBigFile, ranges: npt.NDArray[np.uint64]) -> dict[int, Leaf]:
        """The leaves of a file, of whatever connection."""
        found = {}
        for lo, hi in ranges.tolist():
            load(file)
            for index, leaf in file.leaves(lo, hi):
                checked(leaf, index)
                found[index] = Leaf(leaf.extents, leaf.refs)
        return found

    def borrow(self, ranges: npt.NDArray[np.uint64], found: dict[int, Leaf]) -> None:
        """Take leaves that another connection has loaded at the same snapshot: they are good until `give_back`."""
        with self._lock:
            self._leaves.update(found)
            self._known = ex.union(self._known, ranges)
            self._borrowed = ex.union(self._borrowed, ranges)

    def give_back(self) -> list[tuple[int, int]]:
        """The ranges that were borrowed: the caller must take them as stale."""
        with self._lock:
            borrowed, self._borrowed = self._borrowed, ex.no_ranges()
        return [(lo, hi) for lo, hi in borrowed.tolist()]

    # -- forgetting

    def forget(self, lo: int, hi: int) -> tuple[dict[int, Leaf], npt.NDArray[np.uint64]]:
        """Forget the leaves that touch [lo, hi); returns them, and the ranges in which these were all there are."""
        with self._lock:
            first, stop = lo // LEAF_BYTES, -(-hi // LEAF_BYTES)
            gone = [i for i in self._leaves if first <= i < stop]
            known = ex.intersect(self._known, ex.one_range(first * LEAF_BYTES, stop * LEAF_BYTES))
            self._known = ex.subtract(self._known, known)
            return {i: self._leaves.pop(i) for i in gone}, known


def _expect(file: ZBigFile, leaves: Sequence[tuple[int, Any]]) -> None:
    """Leaves are going to be loaded: a server may be asked for all of them before it has answered for the first."""
    ghosts = [leaf for _, leaf in leaves if leaf._p_changed is None]
    if len(ghosts) > 1:
        file._p_jar.prefetch(ghosts)


def _leaf_range(lo: int, hi: int) -> npt.NDArray[np.uint64]:
    return ex.one_range(lo - lo % LEAF_BYTES, -(-hi // LEAF_BYTES) * LEAF_BYTES)
