"""The persistent extent map: `ZBigFile`, and the radix tree of `ExtentNode` and `ExtentLeaf` under it.

Like an MMU's page table it has fixed keys and is never rebalanced, so which bytes an invalidation touches has
an exact answer. Two transactions that change different bytes of one leaf are merged when the second commits.

These classes are imported by storage servers too, to resolve conflicts.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from persistent import Persistent
from ZODB import POSException
from ZODB.blob import Blob
from ZODB.POSException import ConflictError, POSError, POSKeyError

from dask_zbig.distinct import first_of_each
from dask_zbig.errors import FormatError, ZBigError
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import FANOUT, LEAF_BYTES, MAX_DEPTH, VERSION, broken, name_of, unpack_state
from dask_zbig.storage.leafstate import MOVED, NOT_MOVED, NOTHING, LeafState, Move, merge_leaves
from dask_zbig.storage.packing import put
from dask_zbig.storage.segment import GoneError, InlineSegment, SegmentRef

__all__ = [
    "ExtentLeaf",
    "ExtentNode",
    "Journal",
    "Truncation",
    "ZBigFile",
    "checked",
    "load",
    "node_bytes",
    "on_store",
    "watch",
]

_KEY = np.dtype("<u2")
#: A resize makes all leaves of what is new ahead, if these are so many at most (4 GiB), for writers of different bytes
#: conflict where both would make the same leaf.
LEAVES_AHEAD = 64
#: Of more it makes the first ones (1 GiB): whoever views a sparse array loads them all, and the rest is a hole anyway.
FIRST_AHEAD = 16
#: A leaf notes where this many runs of bytes were before they were joined; of more it does not.
MAX_MOVED = 64

#: What later versions of ZODB make of it.
_StateLoadError: Any = getattr(POSException, "StateLoadError", ())


class _Callbacks:
    """What to call for which object, which is held weakly. Thread-safe.

    A `WeakKeyDictionary` would have Python code run when an object dies, which lets other threads run: the connection's
    own would still find the object in the connection's cache, and have a pointer to freed memory. So no weak reference
    to a persistent object may have a callback, and what is left of those that died is swept up here now and then.
    """

    _FEW = 256

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[weakref.ref[Any], Callable[..., None]]] = {}
        self._sweep_at = self._FEW
        self._lock = threading.RLock()  # a garbage collection may come in while it is held

    def set(self, obj: Any, callback: Callable[..., None]) -> None:
        with self._lock:
            if len(self._by_id) >= self._sweep_at:
                for key, known in list(self._by_id.copy().items()):
                    if known[0]() is None and self._by_id.get(key) is known:
                        del self._by_id[key]
                self._sweep_at = max(self._FEW, 2 * len(self._by_id))
            self._by_id[id(obj)] = (weakref.ref(obj), callback)

    def get(self, obj: Any) -> Callable[..., None] | None:
        ref, callback = self._by_id.get(id(obj), (None, None))
        return callback if ref is not None and ref() is obj else None  # (else it was another one's, at this address)


_watchers = _Callbacks()
_storers = _Callbacks()


def watch(obj: _Watched, callback: Callable[[], None]) -> None:
    """Have `callback` called whenever `obj` is invalidated: changed elsewhere, or its changes aborted.

    Not called for the connection's own commits. Works for ghosts. The callback must not load anything.
    """
    _watchers.set(obj, callback)


def on_store(file: ZBigFile, callback: Callable[[Any], None]) -> None:
    """Have `callback(connection or None)` called before the state of a file is taken, to store or to pickle."""
    _storers.set(file, callback)


def node_bytes(level: int) -> int:
    """Bytes covered by one child of a node of this level."""
    return int(LEAF_BYTES * FANOUT ** (level - 1))


def load(obj: Any) -> None:
    """Load an object's state, if it is a ghost.

    Raises
    ------
    GoneError
        If the database does not have it (any more).
    FormatError
        If what the database has is not its state.
    """
    try:
        obj._p_activate()
    except POSKeyError as e:
        raise GoneError(f"cannot load {name_of(obj)}: the database does not have it (any more)") from e
    except _StateLoadError as e:
        if isinstance(e.__cause__, ZBigError):
            raise e.__cause__ from None
        raise _unreadable(obj, e.__cause__) from e
    except (ZBigError, POSError, OSError):
        raise
    except Exception as e:  # whatever unpickling junk raises
        raise _unreadable(obj, e) from e


def _unreadable(obj: Any, why: BaseException | None) -> FormatError:
    return broken(obj, f"has a record that cannot be read: {type(why).__name__}: {why}")


class _Watched(Persistent):  # type: ignore[misc]
    def _p_invalidate(self) -> None:
        callback = _watchers.get(self)
        if callback is not None:
            callback()
        super()._p_invalidate()


class ExtentLeaf(_Watched):
    """64 MiB of the extent map. Its extents are never changed in place, only replaced."""

    extents: ex.Extents
    refs: tuple[SegmentRef, ...]
    move: Move

    def __init__(self) -> None:
        self.extents = ex.empty()
        self.refs = ()
        self.move = NOT_MOVED

    def __getstate__(self) -> tuple[Any, ...]:
        return LeafState(self.extents, self.refs, self.move).pack()

    def __setstate__(self, state: Any) -> None:
        if state == NOTHING:  # of those that a resize made ahead there are many
            self.extents, self.refs, self.move = ex.empty(), (), NOT_MOVED
            return
        loaded = LeafState.unpack(self, state)
        for ref in loaded.refs:
            if not isinstance(ref.obj, (InlineSegment, Blob)):
                raise broken(self, f"refers to a {type(ref.obj).__name__} as a segment")
        self.extents, self.refs, self.move = loaded.extents, loaded.refs, loaded.move

    def splice(self, new: ex.Extents, refs: Sequence[SegmentRef]) -> None:
        """Put `new` extents, whose segment indices are into `refs`, over what is there."""
        self.move = self.move.older()
        if len(new) == 1:
            start, stop, number, offset = new[0].item()
            key = refs[number].key
            if all(r.key != key for r in self.refs):  # as of most small commits
                extents, order = put(self.extents, len(self.refs), start, stop, offset)
                self._take(extents, [*self.refs, refs[number]], order)
                return
        keys = {r.key: i for i, r in enumerate(self.refs)}
        table = list(self.refs)
        mapping = np.zeros(len(refs), np.int64)
        for i in ex.used(new).tolist():
            index = keys.get(refs[i].key)
            if index is None:
                index = len(table)
                table.append(refs[i])
            mapping[i] = index
        self._replace(ex.splice(self.extents, ex.renumber(new, mapping)), table)

    def cut(self, lo: int, hi: int) -> None:
        """Make [lo, hi) a hole."""
        left = ex.cut(self.extents, lo, hi)
        if left.tobytes() != self.extents.tobytes():
            self._replace(left, self.refs)

    def _replace(self, extents: ex.Extents, table: Sequence[SegmentRef]) -> None:
        extents = ex.coalesce(extents)
        used, first = first_of_each(extents["segment"])
        used = used[np.argsort(first)]  # by first appearance: that takes less space, see `packing`
        mapping = np.zeros(len(table), np.int64)
        mapping[used] = np.arange(len(used))
        self._take(ex.renumber(extents, mapping), table, used.tolist())

    def _take(self, extents: ex.Extents, table: Sequence[SegmentRef], order: Sequence[int]) -> None:
        self.extents = extents
        self.refs = tuple([table[i] for i in order])
        if self.move.to and len(order) < len(table) and all(r.key != self.move.to for r in self.refs):
            self.move = NOT_MOVED  # nothing is left of it

    def join(self, new: ex.Extents, refs: Sequence[SegmentRef], moved: Sequence[tuple[int, int, bytes, int]]) -> None:
        """Put `new` extents in place, whose bytes are those that were there.

        `moved`: (start, stop, oid, offset), where they were; noted if it is one segment that they went to, and
        they are not too many.
        """
        self.splice(new, refs)
        if len(refs) == 1 and len(moved) <= MAX_MOVED:
            self.move = Move(refs[0].key, np.array(moved, MOVED))

    def _p_resolveConflict(self, old: Any, committed: Any, new: Any) -> Any:
        """Merge by byte range. The references are ZODB's placeholders here: only their oids may be looked at."""
        try:
            return merge_leaves(*(LeafState.unpack(self, s) for s in (old, committed, new))).pack()
        except ex.Overlap as overlap:
            first = overlap.ranges[0].tolist()
            raise ConflictError(
                f"bytes {first[0]}..{first[1]} of an array were changed by another transaction"
            ) from overlap


def _identity(reference: Any) -> tuple[Any, Any]:
    return (reference.oid, getattr(reference, "database_name", None))


class ExtentNode(_Watched):
    """A node of the extent map: up to 1024 children by fixed index."""

    level: int
    children: dict[int, Any]

    def __init__(self, level: int) -> None:
        self.level = level
        self.children = {}

    def __getstate__(self) -> tuple[Any, ...]:
        keys = sorted(self.children)
        return (VERSION, self.level, np.array(keys, _KEY).tobytes(), tuple(self.children[k] for k in keys))

    def __setstate__(self, state: Any) -> None:
        level, keys, children = _decode_node(self, state)
        below = ExtentLeaf if level == 1 else ExtentNode
        if not all(isinstance(child, below) for child in children):
            raise broken(self, f"of level {level} has a child that is no {below.__name__}")
        self.level = level
        self.children = dict(zip(keys, children, strict=True))

    def child(self, key: int) -> Any:
        """The child of this key, or None; if it is a node, then loaded, and of the right level."""
        child = self.children.get(key)
        return child if child is None or self.level == 1 else _of_level(child, self.level - 1)

    def put(self, key: int, child: Any) -> None:
        """Add or replace a child."""
        self.children[key] = child
        self._p_changed = True

    def cut(self, first: int) -> None:
        """Remove the children from `first` on."""
        doomed = [k for k in self.children if k >= first]
        for k in doomed:
            del self.children[k]
        if doomed:
            self._p_changed = True

    def _p_resolveConflict(self, old: Any, committed: Any, new: Any) -> Any:
        """Merge by child. A child that both put is a conflict: which bytes it has cannot be seen from here."""
        sides = []
        for state in (old, committed, new):
            level, keys, children = _decode_node(self, state)
            sides.append(dict(zip(keys, children, strict=True)))
        o, c, n = sides
        merged = {}
        for key in sorted(set(o) | set(c) | set(n)):
            ours, theirs, base = (_identity(d[key]) if key in d else None for d in (n, c, o))
            if ours != base and theirs != base and ours != theirs:
                raise ConflictError(f"bytes of child {key} were first written by another transaction")
            winner = c if ours == base else n
            if key in winner:
                merged[key] = winner[key]
        return (VERSION, level, np.array(list(merged), _KEY).tobytes(), tuple(merged.values()))


def _decode_node(node: ExtentNode, state: Any) -> tuple[int, list[int], tuple[Any, ...]]:
    level, packed, children = unpack_state(node, state, 3)
    if not isinstance(packed, bytes) or len(packed) % _KEY.itemsize or not isinstance(children, tuple):
        raise broken(node, "has fields of wrong types or sizes")
    if type(level) is not int or not 1 <= level <= MAX_DEPTH:
        raise broken(node, f"is of level {level!r}")
    keys = np.frombuffer(packed, _KEY).tolist()
    if len(keys) != len(children) or any(a >= b for a, b in itertools.pairwise([*keys, FANOUT])):
        raise broken(node, f"has the keys {keys[:8]}... for {len(children)} children")
    return level, keys, children


def checked(leaf: ExtentLeaf, index: int) -> ExtentLeaf:
    """A leaf, loaded. Raises `FormatError` if its extents are not those of the leaf of this index.

    (No method: to ask a ghost for one loads it.)
    """
    load(leaf)
    if len(leaf.extents) and int(leaf.extents["start"][0]) // LEAF_BYTES != index:
        raise broken(leaf, f"is leaf {index} of its file, but its extents begin at {leaf.extents['start'][0]}")
    return leaf


def _of_level(node: ExtentNode, level: int) -> ExtentNode:
    load(node)
    if node.level != level:  # (else a node could be its own child)
        raise broken(node, f"is of level {node.level}, in the place of one of level {level}")
    return node


class Truncation(Persistent):  # type: ignore[misc]
    """Counts the times when bytes were cut off a file."""

    def __init__(self) -> None:
        self.count = 0

    def __getstate__(self) -> tuple[int, int]:
        return (VERSION, self.count)

    def __setstate__(self, state: Any) -> None:
        (count,) = unpack_state(self, state, 1)
        if not isinstance(count, int):
            raise broken(self, f"has counted to {count!r}")
        self.count = count


class Journal(Persistent):  # type: ignore[misc]
    """The cluster jobs that were published into a file, the last `KEPT` of them: publishing is done once."""

    KEPT = 256

    def __init__(self) -> None:
        self.jobs: tuple[str, ...] = ()

    def __getstate__(self) -> tuple[int, tuple[str, ...]]:
        return (VERSION, self.jobs)

    def __setstate__(self, state: Any) -> None:
        self.jobs = self._unpack(state)

    def _unpack(self, state: Any) -> tuple[str, ...]:
        (jobs,) = unpack_state(self, state, 1)
        if not isinstance(jobs, tuple) or not all(isinstance(job, str) for job in jobs):
            raise broken(self, "has jobs that are no names")
        return jobs

    def add(self, job: str) -> None:
        """Note that `job` is published by this transaction."""
        self.jobs = (*self.jobs, job)[-self.KEPT :]

    def _p_resolveConflict(self, old: Any, committed: Any, new: Any) -> Any:
        """Two jobs may be published at a time; one job may not be published twice."""
        before, theirs, ours = (self._unpack(s) for s in (old, committed, new))
        added = [j for j in ours if j not in before]
        if any(j in theirs for j in added):
            raise ConflictError(f"one of the jobs {added} has been published by another transaction")
        return (VERSION, (*theirs, *added)[-self.KEPT :])


class ZBigFile(_Watched):
    """An endless file of bytes: zeros where nothing was written."""

    def __init__(self) -> None:
        self.depth = 0
        self.root: Any = None
        self.truncation = Truncation()
        self.journal = Journal()

    def __getstate__(self) -> tuple[Any, ...]:
        callback = _storers.get(self)
        if callback is not None:
            callback(self._p_jar)
        return (VERSION, self.depth, self.root, self.truncation, self.journal)

    def __setstate__(self, state: Any) -> None:
        depth, root, truncation, journal = unpack_state(self, state, 4)
        if type(depth) is not int or not 0 <= depth <= MAX_DEPTH:
            raise broken(self, f"has a map of depth {depth!r}")
        if not isinstance(root, ExtentNode if depth else (ExtentLeaf, type(None))):
            raise broken(self, f"has a {type(root).__name__} as the root of a map of depth {depth}")
        if not isinstance(truncation, Truncation) or not isinstance(journal, Journal):
            raise broken(self, "has fields of wrong types")
        self.depth, self.root, self.truncation, self.journal = depth, root, truncation, journal

    # -- reading

    def nodes(self, lo: int, hi: int) -> Iterator[tuple[ExtentNode, int, int]]:
        """The nodes that cover bytes of [lo, hi), with the bytes each covers: watched, they tell of new leaves."""
        if self.depth:
            yield from _nodes(self._top(), 0, lo, hi)

    def leaves(self, lo: int, hi: int) -> Iterator[tuple[int, ExtentLeaf]]:
        """The existing leaves that cover bytes of [lo, hi), by ascending index."""
        if self.root is None:
            return
        if self.depth == 0:
            if lo < LEAF_BYTES and hi > 0:
                yield 0, self.root
            return
        yield from _leaves(self._top(), 0, lo, hi)

    def _top(self) -> Any:
        """The root, if it is a node then of the right level."""
        return _of_level(self.root, self.depth) if self.depth else self.root

    # -- changing

    def reserve(self, size: int, grown_from: int = 0) -> None:
        """Make the tree deep enough for `size` bytes, with the leaves of what is new, or the first of them.

        It is whoever changes the size that changes the tree's shape; so writers of data need not, and do not
        conflict with each other over it.
        """
        while size > (node_bytes(self.depth + 1) if self.depth or self.root is not None else 0):
            self._deepen()
        if self.depth == 0:
            return
        first = grown_from // LEAF_BYTES
        last = -(-size // LEAF_BYTES)
        for index in range(first, last if last - first <= LEAVES_AHEAD else first + FIRST_AHEAD):
            self.leaf(index)

    def _deepen(self) -> None:
        if self.root is None:
            self.root = ExtentLeaf()
            return
        node = ExtentNode(self.depth + 1)
        node.put(0, self.root)
        self.root = node
        self.depth += 1

    def leaf(self, index: int) -> ExtentLeaf:
        """The leaf of this index, made if need be."""
        while self.root is None or (index >= FANOUT**self.depth):
            self._deepen()
        node = self._top()
        for level in range(self.depth, 0, -1):
            key = index // FANOUT ** (level - 1) % FANOUT
            child = node.child(key)
            if child is None:
                child = ExtentLeaf() if level == 1 else ExtentNode(level - 1)
                node.put(key, child)
            node = child
        return node  # type: ignore[no-any-return]

    def truncate(self, size: int) -> None:
        """Cut off everything from byte `size` on: one path of the tree, whatever its size."""
        self.truncation.count += 1
        node, base = self._top(), 0
        for level in range(self.depth, 0, -1):
            span = node_bytes(level)
            key = (size - base) // span
            node.cut(key + 1)
            base += key * span
            node = node.child(key)
            if node is None:
                return
        if node is not None:
            checked(node, base // LEAF_BYTES).cut(size, base + LEAF_BYTES)

    def ends_by(self, size: int) -> bool:
        """Whether nothing is stored from byte `size` on. Looks along one path of the tree."""
        node, base = self._top(), 0
        for level in range(self.depth, 0, -1):
            span = node_bytes(level)
            key = (size - base) // span
            if any(k > key for k in node.children):
                return False
            base += key * span
            node = node.child(key)
            if node is None:
                return True
        if node is None:
            return True
        extents = checked(node, base // LEAF_BYTES).extents
        return not len(extents) or int(extents["stop"][-1]) <= size

    def clear(self) -> None:
        """Forget everything. For a file that is not stored."""
        self.depth = 0
        self.root = None
        self.truncation = Truncation()
        self.journal = Journal()


def _nodes(node: ExtentNode, base: int, lo: int, hi: int) -> Iterator[tuple[ExtentNode, int, int]]:
    yield node, base, base + FANOUT * node_bytes(node.level)
    if node.level == 1:
        return
    span = node_bytes(node.level)
    for key in sorted(node.children):
        if base + key * span < hi and base + (key + 1) * span > lo:
            yield from _nodes(node.child(key), base + key * span, lo, hi)


def _leaves(node: ExtentNode, base: int, lo: int, hi: int) -> Iterator[tuple[int, ExtentLeaf]]:
    span = node_bytes(node.level)
    for key in sorted(node.children):
        at = base + key * span
        if at >= hi or at + span <= lo:
            continue
        if node.level == 1:
            yield at // LEAF_BYTES, node.children[key]
        else:
            yield from _leaves(node.child(key), at, lo, hi)
