"""The extent algebra: which bytes of an array come from which bytes of which segment.

An *extents* array has the dtype `EXTENT`: in each row, bytes [start, stop) of the array are served by a
segment, the first of them by the segment's byte ``offset``. Rows are sorted, disjoint, never empty, and
byte-granular. ``segment`` is an index into a table that is kept elsewhere. Bytes in no extent are a *hole*:
zeros. A *ranges* array is uint64 of shape (n, 2): sorted, disjoint, not empty; in results also merged.

All is pure: no ZODB, no I/O, no Python loop over many extents. Arguments are never changed and results share no
memory with them, so any thread may call anything. Positions are below 2^64 - 1; bounds outside of that mean
the nearest end. Only `make` and `validate` look for rows that break the rules; the others rely on them.

Most commits and views have a handful of extents, for which a call of NumPy costs more than all there is to do. So
what they go through has a second way, by plain tuples, for at most `FEW` rows. Both ways give the same.

>>> splice(make([(0, 100, 0, 0)]), make([(40, 50, 1, 0)])).tolist()
[(0, 40, 0, 0), (40, 50, 1, 0), (50, 100, 0, 50)]
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dask_zbig.distinct import distinct, numbered
from dask_zbig.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

__all__ = [
    "EXTENT",
    "Extents",
    "Keys",
    "Overlap",
    "Ranges",
    "changed",
    "clip",
    "coalesce",
    "combine",
    "covered",
    "cut",
    "diff",
    "empty",
    "holes",
    "intersect",
    "lookup",
    "make",
    "merge",
    "no_ranges",
    "normalize",
    "one_range",
    "renumber",
    "restrict",
    "splice",
    "subtract",
    "total",
    "union",
    "used",
    "validate",
]

#: One extent: 28 bytes, packed, little-endian. This is what is stored.
EXTENT = np.dtype([("start", "<u8"), ("stop", "<u8"), ("segment", "<u4"), ("offset", "<u8")])

Extents: TypeAlias = npt.NDArray[np.void]
Ranges: TypeAlias = npt.NDArray[np.uint64]
Keys: TypeAlias = "Sequence[Hashable]"
_Row: TypeAlias = "tuple[int, int, int, int]"
_Bools: TypeAlias = npt.NDArray[np.bool_]
_Indices: TypeAlias = npt.NDArray[np.intp]

_END = 2**64 - 1
#: So few rows are looked at one by one: that takes less than NumPy's calls do.
FEW = 8


class Overlap(Exception):
    """Both sides of a `merge` changed the bytes in `ranges`, and not to the same thing."""

    def __init__(self, ranges: Ranges) -> None:
        super().__init__(ranges)
        self.ranges = ranges

    def __str__(self) -> str:
        first = f", the first of them {self.ranges[0, 0]}..{self.ranges[0, 1]}" if len(self.ranges) else ""
        return f"{total(self.ranges)} bytes were changed by both sides{first}"


# -- making and checking


def empty() -> Extents:
    """No extents: all is hole.

    >>> len(empty())
    0
    """
    return np.empty(0, EXTENT)


def make(rows: Iterable[tuple[int, int, int, int]]) -> Extents:
    """Extents from (start, stop, segment, offset) rows; `FormatError` if not sorted, disjoint and non-empty.

    >>> make([(0, 10, 0, 0), (10, 12, 1, 5)])["stop"].tolist()
    [10, 12]
    """
    listed = [tuple(row) for row in rows]
    extents = np.array(listed, EXTENT)
    if len(listed) > 4 * FEW or not _in_order(listed):
        _check_order(extents)
    return extents


def _in_order(rows: Sequence[tuple[int, ...]]) -> bool:
    at = 0
    for row in rows:
        if not at <= row[0] < row[1]:
            return False
        at = row[1]
    return True


def validate(extents: Extents, lengths: Sequence[int], lo: int, hi: int) -> None:
    """Check extents of unknown origin, whatever their bytes are.

    Parameters
    ----------
    lengths
        The length in bytes of each segment of the table.
    lo, hi
        The extents may cover only bytes [lo, hi) of the array.

    Raises
    ------
    FormatError
        Names the first extent that is empty, out of order, outside of [lo, hi) or of what its segment has.

    >>> validate(make([(0, 10, 0, 90)]), [100], 0, 64)
    >>> validate(make([(0, 11, 0, 90)]), [100], 0, 64)
    Traceback (most recent call last):
    dask_zbig.errors.FormatError: extent 0 (start 0, stop 11, segment 0, offset 90) ends beyond its segment
    """
    if len(extents) <= 4 * FEW and _few_are_valid(extents.tolist(), lengths, lo, hi):
        return
    _check_order(extents)
    low, high = _bound(lo), _bound(hi)
    _refuse(extents, (extents["start"] < low) | (extents["stop"] > high), f"is outside of [{lo}, {hi})")
    _refuse(extents, extents["segment"] >= len(lengths), f"is of none of the {len(lengths)} segments")
    # subtract only what is known to be smaller: sums could wrap around
    length = np.asarray(lengths, np.uint64)[extents["segment"]]
    room = length - np.minimum(extents["offset"], length)
    _refuse(extents, extents["stop"] - extents["start"] > room, "ends beyond its segment")


def _few_are_valid(rows: list[tuple[int, int, int, int]], lengths: Sequence[int], lo: int, hi: int) -> bool:
    """Whether nothing is wrong. (If something is, it is for `validate` to tell what.)"""
    at = lo
    for start, stop, segment, offset in rows:
        if not (at <= start < stop <= hi and segment < len(lengths) and offset + stop - start <= lengths[segment]):
            return False
        at = stop
    return True


def _check_order(extents: Extents) -> None:
    starts, stops = extents["start"], extents["stop"]
    _refuse(extents, starts >= stops, "is empty")
    _refuse(extents, starts[1:] < starts[:-1], "is not sorted: it starts before the previous one")
    _refuse(extents, starts[1:] < stops[:-1], "overlaps the previous one")


def _refuse(extents: Extents, bad: _Bools, reason: str) -> None:
    """Raise if a flag is set; if they are fewer than the extents, they are about the last ones."""
    if bad.any():
        index = len(extents) - len(bad) + int(bad.argmax())
        row = zip(EXTENT.names or (), extents[index].tolist(), strict=True)
        fields = ", ".join(f"{name} {value}" for name, value in row)
        raise FormatError(f"extent {index} ({fields}) {reason}")


def _bound(position: int) -> np.uint64:
    return np.uint64(min(max(int(position), 0), _END))


# -- cutting and joining extents


def lookup(extents: Extents, position: int) -> int:
    """Index of the extent that covers the byte at `position`, or -1. Takes O(log n).

    >>> extents = make([(10, 20, 0, 0)])
    >>> lookup(extents, 19), lookup(extents, 20)
    (0, -1)
    """
    index = bisect_right(extents["start"], position) - 1
    return index if index >= 0 and position < extents["stop"][index] else -1


def clip(extents: Extents, lo: int, hi: int) -> Extents:
    """The parts inside [lo, hi).

    >>> clip(make([(0, 10, 0, 0), (20, 30, 0, 50)]), 5, 25).tolist()
    [(5, 10, 0, 5), (20, 25, 0, 50)]
    """
    lo, hi = max(lo, 0), min(hi, _END)
    if lo >= hi or not len(extents):
        return empty()
    if len(extents) <= FEW:
        rows = extents.tolist()
        return _few(_clipped(rows, lo, hi))
    starts, stops = extents["start"], extents["stop"]
    if starts[0] >= lo and stops[-1] <= hi:
        return extents.copy()
    part = extents[bisect_right(stops, lo) : bisect_left(starts, hi)].copy()
    if len(part):
        start, stop, segment, offset = part[0].item()
        if start < lo:
            part[0] = (lo, stop, segment, offset + lo - start)
        if part["stop"][-1] > hi:
            part["stop"][-1] = hi
    return part


def cut(extents: Extents, lo: int, hi: int) -> Extents:
    """What is left after making [lo, hi) a hole.

    >>> cut(make([(0, 10, 0, 0)]), 4, 6).tolist()
    [(0, 4, 0, 0), (6, 10, 0, 6)]
    """
    low, high = _bound(lo), _bound(hi)
    if low >= high:
        return extents.copy()
    return np.concatenate([clip(extents, 0, int(low)), clip(extents, int(high), _END)], dtype=EXTENT)


def splice(old: Extents, new: Extents) -> Extents:
    """`new` over `old`; both refer to one table of segments. Not coalesced.

    >>> splice(make([(0, 10, 0, 0)]), make([(8, 12, 1, 0)])).tolist()
    [(0, 8, 0, 0), (8, 12, 1, 0)]
    """
    if not len(old):
        return new.copy()  # as it is, for arrays that are written for the first time
    if len(old) + len(new) <= FEW:
        rows = new.tolist()
        return _few(sorted(_outside(old.tolist(), rows) + rows))
    if len(new) == 1:  # as most small commits have it: a quarter of the time
        lo, hi = int(new["start"][0]), int(new["stop"][0])
        return np.concatenate([clip(old, 0, lo), new, clip(old, hi, _END)], dtype=EXTENT)
    return _interleave(restrict(old, _complement(covered(new))), new)


def coalesce(extents: Extents) -> Extents:
    """Join neighbours that are contiguous both in the array and in their segment.

    >>> coalesce(make([(0, 4, 0, 0), (4, 9, 0, 4), (9, 10, 0, 0)])).tolist()
    [(0, 9, 0, 0), (9, 10, 0, 0)]
    """
    if len(extents) < 2:
        return extents.copy()
    if len(extents) <= FEW:
        rows: list[_Row] = []
        for start, stop, segment, offset in extents.tolist():
            if rows:
                a, b, s, o = rows[-1]
                if start == b and segment == s and offset == o + b - a:
                    rows[-1] = (a, stop, s, o)
                    continue
            rows.append((start, stop, segment, offset))
        return _few(rows)
    before, after = extents[:-1], extents[1:]
    apart = before["stop"] != after["start"]
    apart |= before["segment"] != after["segment"]
    apart |= after["offset"] - before["offset"] != after["start"] - before["start"]
    head, tail = _runs(len(extents), apart)
    joined = extents.take(head)
    joined["stop"] = extents["stop"][tail]
    return joined


def renumber(extents: Extents, mapping: npt.NDArray[np.integer[Any]]) -> Extents:
    """The same extents with each segment index ``s`` replaced by ``mapping[s]``.

    >>> renumber(make([(0, 4, 1, 0)]), np.array([0, 7]))["segment"].tolist()
    [7]
    """
    if len(extents) <= FEW:
        return _few([(start, stop, mapping.item(s), offset) for start, stop, s, offset in extents.tolist()])
    renumbered = extents.copy()
    renumbered["segment"] = mapping[extents["segment"]]
    return renumbered


def used(extents: Extents) -> _Indices:
    """The segment indices that occur, ascending, each once.

    >>> used(make([(0, 4, 3, 0), (4, 6, 1, 0), (6, 8, 3, 6)])).tolist()
    [1, 3]
    """
    if len(extents) <= FEW:
        return np.array(sorted({row[2] for row in extents.tolist()}), np.intp)
    return distinct(extents["segment"]).astype(np.intp)


def restrict(extents: Extents, ranges: Ranges) -> Extents:
    """The parts inside the ranges."""
    if len(extents) + len(ranges) <= FEW:
        rows = extents.tolist()
        return _few([row for lo, hi in ranges.tolist() for row in _clipped(rows, lo, hi)])
    starts, stops = extents["start"], extents["stop"]
    index, piece = _pieces(_pairs(starts, stops), ranges)
    part = extents.take(index)  # five times as fast as indexing
    part["offset"] += piece[:, 0] - part["start"]
    part["start"], part["stop"] = piece[:, 0], piece[:, 1]
    return part


def _few(rows: Sequence[_Row]) -> Extents:
    """Extents out of rows that are known to be right."""
    return np.array(rows, EXTENT)


def _clipped(rows: Sequence[_Row], lo: int, hi: int) -> list[_Row]:
    """As `clip`."""
    return [
        (start if start > lo else lo, stop if stop < hi else hi, segment, offset if start > lo else offset + lo - start)
        for start, stop, segment, offset in rows
        if start < hi and stop > lo
    ]


def _outside(rows: Sequence[_Row], over: Sequence[_Row]) -> list[_Row]:
    """The parts of rows that no row of `over` covers."""
    left = []
    for start, stop, segment, offset in rows:
        at = start
        for lo, hi, *_ in over:
            if lo >= stop:
                break
            if hi <= at:
                continue
            if lo > at:
                left.append((at, lo, segment, offset + at - start))
            at = hi
        if at < stop:
            left.append((at, stop, segment, offset + at - start))
    return left


def _interleave(a: Extents, b: Extents) -> Extents:
    """The extents of both, which do not overlap."""
    rows = np.concatenate([a, b], dtype=EXTENT)
    return rows.take(np.argsort(rows["start"], kind="stable"))  # merges two sorted runs


# -- ranges


def covered(extents: Extents) -> Ranges:
    """The bytes that some extent serves, merged.

    >>> covered(make([(0, 4, 0, 0), (4, 6, 1, 0), (8, 9, 0, 4)])).tolist()
    [[0, 6], [8, 9]]
    """
    if len(extents) <= FEW:
        return _few_ranges([row[:2] for row in extents.tolist()])
    return _join(_pairs(extents["start"], extents["stop"]))


def holes(extents: Extents, lo: int, hi: int) -> Ranges:
    """The bytes of [lo, hi) that no extent serves, merged.

    >>> holes(make([(2, 4, 0, 0)]), 0, 10).tolist()
    [[0, 2], [4, 10]]
    """
    return _complement(covered(clip(extents, lo, hi)), lo, hi)


def no_ranges() -> Ranges:
    """Ranges of nothing."""
    return np.empty((0, 2), np.uint64)


def one_range(lo: int, hi: int) -> Ranges:
    """[lo, hi) as ranges; none if it is empty."""
    return np.array([(lo, hi)], np.uint64) if lo < hi else no_ranges()


def normalize(ranges: npt.ArrayLike) -> Ranges:
    """Any rows of (start, stop), sorted and merged, without the empty ones (start >= stop).

    >>> normalize([[5, 9], [0, 5], [7, 8], [3, 3]]).tolist()
    [[0, 9]]
    """
    rows = np.asarray(ranges, np.uint64).reshape(-1, 2)
    if len(rows) <= FEW:
        return _few_ranges(sorted(row for row in rows.tolist() if row[0] < row[1]))
    rows = rows[rows[:, 0] < rows[:, 1]]
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    rows[:, 1] = np.maximum.accumulate(rows[:, 1])
    return _join(rows)


def union(a: Ranges, b: Ranges) -> Ranges:
    """The bytes in `a` or in `b`, merged.

    >>> union(normalize([[0, 4]]), normalize([[4, 6], [8, 9]])).tolist()
    [[0, 6], [8, 9]]
    """
    if len(a) + len(b) <= FEW:
        return _few_ranges(sorted(a.tolist() + b.tolist()))
    if not len(a) or not len(b):
        return _join(a if len(a) else b).copy()
    return normalize(np.concatenate([a, b]))


def intersect(a: Ranges, b: Ranges) -> Ranges:
    """The bytes in both `a` and `b`, merged.

    >>> intersect(normalize([[0, 4], [6, 9]]), normalize([[3, 7]])).tolist()
    [[3, 4], [6, 7]]
    """
    if len(a) + len(b) <= FEW:
        rows = b.tolist()
        both = [(max(lo, x), min(hi, y)) for lo, hi in a.tolist() for x, y in rows if lo < y and x < hi]
        return _few_ranges(both)
    return _join(_pieces(a, b)[1])


def subtract(a: Ranges, b: Ranges) -> Ranges:
    """The bytes in `a` but not in `b`, merged.

    >>> subtract(normalize([[0, 9]]), normalize([[3, 7]])).tolist()
    [[0, 3], [7, 9]]
    """
    if not len(a) or not len(b):
        return _join(a).copy()
    if len(a) + len(b) <= FEW:
        over = [(lo, hi, 0, 0) for lo, hi in b.tolist()]
        return _few_ranges([row[:2] for row in _outside([(lo, hi, 0, 0) for lo, hi in a.tolist()], over)])
    return intersect(a, _complement(b))


def total(ranges: Ranges) -> int:
    """How many bytes the ranges have.

    >>> total(normalize([[0, 4], [6, 9]]))
    7
    """
    if len(ranges) <= FEW:
        return sum(hi - lo for lo, hi in ranges.tolist())
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def _few_ranges(rows: Sequence[Sequence[int]]) -> Ranges:
    """Ranges out of sorted rows that are not empty, merged."""
    merged: list[list[int]] = []
    for lo, hi in rows:
        if merged and lo <= merged[-1][1]:
            merged[-1][1] = max(hi, merged[-1][1])
        else:
            merged.append([lo, hi])
    return np.array(merged, np.uint64) if merged else no_ranges()


def _join(ranges: Ranges) -> Ranges:
    """Merge sorted ranges that touch or overlap; their stops must ascend too."""
    if len(ranges) < 2:
        return ranges
    head, tail = _runs(len(ranges), ranges[1:, 0] > ranges[:-1, 1])
    return _pairs(ranges[head, 0], ranges[tail, 1])


def _pairs(starts: npt.NDArray[Any], stops: npt.NDArray[Any]) -> Ranges:
    """np.stack in a fraction of its time, which for a few ranges is most of what there is to do."""
    pairs = np.empty((len(starts), 2), np.uint64)
    pairs[:, 0] = starts
    pairs[:, 1] = stops
    return pairs


def _runs(count: int, apart: _Bools) -> tuple[_Indices, _Indices]:
    """First and last index of each run of rows; `apart` has a flag for each two neighbours."""
    if not count:
        return np.empty(0, np.intp), np.empty(0, np.intp)
    borders = apart.nonzero()[0]
    head, tail = np.zeros(len(borders) + 1, np.intp), np.full(len(borders) + 1, count - 1, np.intp)
    np.add(borders, 1, out=head[1:])
    tail[:-1] = borders
    return head, tail


def _complement(ranges: Ranges, lo: int = 0, hi: int = _END) -> Ranges:
    """The rest of [lo, hi), which has all of the ranges."""
    low, high = np.full(1, _bound(lo)), np.full(1, _bound(hi))
    gaps = np.concatenate([low, ranges.ravel(), high]).reshape(-1, 2)
    return gaps[gaps[:, 0] < gaps[:, 1]]


def _pieces(a: Ranges, b: Ranges) -> tuple[_Indices, Ranges]:
    """What `a` and `b` have in common, in pieces that lie in one row of each; and which row of `a`."""
    if not len(a) or not len(b):
        return np.empty(0, np.intp), no_ranges()
    first = np.searchsorted(a[:, 1], b[:, 0], "right")
    count = np.searchsorted(a[:, 0], b[:, 1], "left") - first
    in_b = np.repeat(np.arange(len(b)), count)
    in_a = np.arange(len(in_b)) + np.repeat(first - (np.cumsum(count) - count), count)
    starts, stops = np.maximum(a[in_a, 0], b[in_b, 0]), np.minimum(a[in_a, 1], b[in_b, 1])
    return in_a, _pairs(starts, stops)


# -- comparing and merging


def diff(a: Extents, keys_a: Keys, b: Extents, keys_b: Keys) -> Ranges:
    """The bytes where `a` and `b` differ.

    Two bytes are the same if both are in holes, or if they are the same byte of segments with equal keys. The
    keys are the identities of the segments in each side's own table.

    >>> diff(make([(0, 9, 0, 0)]), ["x"], make([(0, 3, 1, 0), (3, 9, 0, 0)]), ["y", "x"]).tolist()
    [[3, 9]]
    """
    a, b = _identified((a, keys_a), (b, keys_b))
    # not np.unique, which hashes: this merges four sorted runs, a hundred times as fast
    points = np.sort(np.concatenate([a["start"], a["stop"], b["start"], b["stop"]]), kind="stable")
    pieces = _pairs(points[:-1], points[1:])  # neither side has an edge inside of a piece
    pieces = pieces[pieces[:, 0] < pieces[:, 1]]
    segment_a, offset_a = _sources(a, pieces[:, 0])
    segment_b, offset_b = _sources(b, pieces[:, 0])
    return _join(pieces[(segment_a != segment_b) | (offset_a != offset_b)])


def merge(
    old: Extents, keys_old: Keys, committed: Extents, keys_committed: Keys, new: Extents, keys_new: Keys
) -> tuple[Extents, list[tuple[str, int]]]:
    """Merge two changes of `old`, byte by byte: `new` where it changed something, else `committed`.

    The keys are the identities of the segments in each side's own table.

    Returns
    -------
    extents, table
        The merged extents, coalesced. Their segment ``s`` is segment ``table[s][1]`` of the side named
        ``table[s][0]``, "committed" or "new". Each key is listed once, and only if it is used.

    Raises
    ------
    Overlap
        Bytes were changed by both, and not to the same thing.

    >>> old, new = make([(0, 9, 0, 0)]), make([(0, 4, 0, 0)])
    >>> committed = make([(0, 2, 0, 0), (2, 9, 1, 2)])
    >>> extents, table = merge(old, ["x"], committed, ["y", "x"], new, ["x"])
    >>> extents.tolist(), table
    ([(0, 2, 0, 0), (2, 4, 1, 2)], [('committed', 0), ('committed', 1)])
    """
    ours = changed(old, keys_old, committed, keys_committed, new, keys_new)
    return combine(committed, keys_committed, new, keys_new, ours)


def changed(
    old: Extents, keys_old: Keys, committed: Extents, keys_committed: Keys, new: Extents, keys_new: Keys
) -> Ranges:
    """The bytes that `new` changed of `old`. Raises `Overlap` if `committed` changed some of them otherwise.

    >>> changed(empty(), [], empty(), [], make([(3, 5, 0, 0)]), ["x"]).tolist()
    [[3, 5]]
    """
    ours = diff(old, keys_old, new, keys_new)
    both = intersect(ours, diff(old, keys_old, committed, keys_committed))
    conflict = intersect(both, diff(committed, keys_committed, new, keys_new)) if len(both) else both
    if len(conflict):
        raise Overlap(conflict)
    return ours


def combine(
    committed: Extents, keys_committed: Keys, new: Extents, keys_new: Keys, ours: Ranges
) -> tuple[Extents, list[tuple[str, int]]]:
    """`new` in the ranges `ours`, else `committed`; returned as by `merge`.

    >>> combine(make([(0, 9, 0, 0)]), ["x"], make([(0, 9, 0, 0)]), ["y"], one_range(2, 4))[0].tolist()
    [(0, 2, 0, 0), (2, 4, 1, 2), (4, 9, 0, 4)]
    """
    committed, new = _identified((committed, keys_committed), (new, keys_new))
    merged = coalesce(_interleave(restrict(committed, _complement(ours)), restrict(new, ours)))
    indices, merged["segment"] = numbered(merged["segment"])
    count = len(keys_committed)
    return merged, [("committed", i) if i < count else ("new", i - count) for i in indices.tolist()]


def _identified(*sides: tuple[Extents, Keys]) -> list[Extents]:
    """The extents of each side, with indices into all keys together: the first of those that are equal."""
    keys = [key for _, side in sides for key in side]
    first = {key: index for index, key in reversed([*enumerate(keys)])}
    return [renumber(extents, np.array([first[key] for key in side], np.intp)) for extents, side in sides]


def _sources(extents: Extents, points: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], Ranges]:
    """Segment and offset of the byte at each point; (-1, 0) in a hole."""
    if not len(extents):
        return np.full(len(points), -1, np.int64), np.zeros(len(points), np.uint64)
    at = np.searchsorted(extents["start"], points, "right") - 1
    found = extents.take(at)
    inside = (at >= 0) & (points < found["stop"])
    segment = np.where(inside, found["segment"].astype(np.int64), -1)
    return segment, np.where(inside, found["offset"] + (points - found["start"]), np.uint64(0))
