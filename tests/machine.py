"""What the state machine compares with: the array in plain NumPy, as committed, and as each connection sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dask_zbig.storage.format import LEAF_BYTES

ROOM = 200_000  # elements that are written, of 2 bytes: more than a commit keeps inline
GAP = LEAF_BYTES // 2 - 1000  # at the border of two leaves
SCATTERED = 4000  # of more separate changes neighbours may be joined (see dask_zbig.trim), and more than them conflict


class Regions:
    """What of an array is used: all of it, or two parts. What lies between these is nobody's, and not in the model.

    But for one element, which keeps apart what is apart.
    """

    def __init__(self, *parts):
        self.parts = parts  # as the array has them
        self.skipped = parts[1][0] - parts[0][1] - 1 if len(parts) == 2 else 0
        self._first = parts[0][1] if self.skipped else None  # what follows this is moved

    @property
    def of_model(self):
        """`parts` as the model has them."""
        return [(lo - self.skipped if lo else lo, hi) for lo, hi in self.parts]

    def size(self, n):
        """The array's length if the model has `n`."""
        return n + self.skipped if self.skipped and n > self._first else n

    def model_size(self, n):
        """The other way round. No array ends in what is nobody's."""
        return n - self.skipped if self.skipped and n > self._first else n

    def places(self, where):
        """Positions in the model -> in the array."""
        return where + self.skipped * (where >= self._first) if self.skipped else where

    def model_places(self, where):
        """The other way round."""
        return where - self.skipped * (where >= self._first) if self.skipped else where


FLAT = Regions((0, None))
DEEP = Regions((0, ROOM), (GAP - ROOM, None))


@dataclass(frozen=True)
class Snapshot:
    """A state of array and counters. Never changed in place."""

    array: np.ndarray
    counters: tuple[int, ...]

    def parts(self, regions):
        """What there is to compare: shape, counters, and copies of the regions."""
        shown = [self.array[lo:hi].copy() for lo, hi in regions.of_model]
        return (regions.size(len(self.array)),), list(self.counters), shown


class Change:
    """What a transaction did: what was where, before it.

    `hidden`: where it wrote beyond the end, and what. Whoever shortens an array has others who write there conflict,
    but for an undo. To whoever makes the array longer these are zeros, if they are there already; if both are
    committed side by side, they are kept.
    """

    def __init__(self, before, after, *, resized, note, undone=None, hidden=None):
        self.size = len(before.array)
        n = min(self.size, len(after.array))
        tail = before.array[n:] if n < self.size else after.array[n:]
        self.where = np.concatenate(
            [np.flatnonzero(before.array[:n] != after.array[:n]), np.flatnonzero(tail) + n]  # (there are zeros beyond)
        )
        self.was = np.zeros(len(self.where), "<u2")
        self.was[self.where < self.size] = before.array[self.where[self.where < self.size]]
        self.counters = before.counters
        self.counted = _differing(before.counters, after.counters)
        self.resized = resized  # it stored a shape, if only the old one
        self.undone = undone  # the change that it undid
        self.hidden = hidden or {}
        self.note = note

    @property
    def touched(self):
        """Where it stored something, if only beyond the end: a write that was undone when it was cut off already."""
        where = np.union1d(self.where, np.fromiter(self.hidden, int))
        return where if self.undone is None else np.union1d(where, self.undone.touched)

    @property
    def scattered(self):
        return _scattered(self.where)


class Seen:
    """What a connection should see: what was committed at `version`, and the changes that it made."""

    def __init__(self, snapshot, version):
        self.base = snapshot
        self.version = version
        self.array = snapshot.array.copy()
        self.counters = list(snapshot.counters)
        self.written = np.zeros(len(self.array), bool)
        self.resized = False
        self.touched = False  # written to, if only what was there already

    def state(self):
        return self.array.copy(), list(self.counters), self.written.copy(), self.resized

    def restore(self, state):
        array, counters, written, self.resized = state
        self.array, self.counters, self.written = array.copy(), list(counters), written.copy()

    def write(self, where, data):
        self.touched = True
        self.written[where] |= self.array[where] != data
        self.array[where] = data

    def resize(self, size):
        kept = min(size, len(self.array))
        array, written = np.zeros(size, "<u2"), np.ones(size, bool)
        array[:kept], written[:kept] = self.array[:kept], self.written[:kept]
        self.array, self.written, self.resized = array, written, True

    def append(self, data):
        size = len(self.array)
        if len(data):
            self.resize(size + len(data))
            self.array[size:] = data

    def mask(self):
        """The elements that differ from what was committed: one that got its old value back is not changed."""
        n = min(len(self.base.array), len(self.array))
        mask = self.written.copy()
        mask[:n] &= self.array[:n] != self.base.array[:n]
        return mask

    def counted(self):
        return _differing(self.base.counters, self.counters)

    @property
    def changed(self):
        return self.resized or bool(self.written.any() or self.counted())

    def conflicts(self, changes, merges):
        """Whether a commit after these changes of others must, may or must not conflict: True, None or False."""
        if not self.changed and not self.touched:
            return False
        sure = maybe = False
        mask, counted = self.mask(), self.counted()
        undone = any(change.undone for change in changes)
        scattered = _scattered(np.flatnonzero(mask)) or any(change.scattered for change in changes)
        for change in changes:
            both = bool(mask[change.where[change.where < len(mask)]].any())
            # what an undo brought back is what we began with, and then nobody changed it
            sure |= both and not undone
            sure |= (change.resized and self.resized) or bool(counted & change.counted)
            # a change of shape meets a change of data: shrinking conflicts; and a storage may merge nothing
            maybe |= both or scattered or change.resized or self.resized or not merges
        return True if sure else None if maybe else False

    def beyond(self, committed):
        """What it writes beyond the end of what is `committed` now."""
        if self.resized:
            return {}
        where = np.flatnonzero(self.mask())
        where = where[where >= len(committed.array)]
        return dict(zip(where.tolist(), self.array[where].tolist(), strict=True))

    def merged(self, committed):
        """What is committed by it, after what is `committed` now."""
        mask = self.mask()
        array = self.array.copy() if self.resized else committed.array.copy()
        n = min(len(self.array), len(committed.array))
        array[:n] = np.where(mask[:n], self.array[:n], committed.array[:n])
        counted = self.counted()
        counters = [ours if i in counted else n for i, (ours, n) in _pairs(self.counters, committed.counters)]
        return Snapshot(array, tuple(counters))


def undo(committed, changes, number):
    """What is committed without changes[number], which elements of that may be as they are now as well, and whether
    the storage may refuse.

    ZODB undoes by object: what was not changed since is as
    before, what was is merged as in a conflict. So the last change can always be undone; an older one if nothing
    that it changed was changed again, or if that was undone.
    """
    change, later = changes[number], changes[number + 1 :]
    may_fail = any(
        other.resized
        or change.resized
        or change.counted & other.counted
        or change.scattered
        or other.scattered
        # a change that was undone since, and is now to be undone again, may have made objects that are no more
        or other.undone
        for other in later
    )
    touched = np.concatenate([np.empty(0, int), *(other.touched for other in later)])
    again = np.isin(change.where, touched)
    size = change.size if change.resized else len(committed.array)
    array = sized(committed.array, max(size, change.where.max(initial=0) + 1))
    array[change.where] = change.was
    counters = [old if i in change.counted else n for i, (old, n) in _pairs(change.counters, committed.counters)]
    # (what was brought back where the array had ended already shows when it has its old length again)
    hidden = touched[touched >= len(committed.array)]
    doubtful = np.union1d(change.where[again], hidden)
    doubtful = doubtful[doubtful < size]
    return Snapshot(array[:size].copy(), tuple(counters)), doubtful, bool(may_fail or again.any())


def sized(array, size):
    """A copy, cut or filled up with zeros."""
    out = np.zeros(size, array.dtype)
    kept = min(size, len(array))
    out[:kept] = array[:kept]
    return out


def _scattered(where):
    return np.count_nonzero(np.diff(where) > 1) > SCATTERED


def _pairs(one, two):
    return enumerate(zip(one, two, strict=True))


def _differing(one, two):
    return {i for i, (a, b) in _pairs(one, two) if a != b}
