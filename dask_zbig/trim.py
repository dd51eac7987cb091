"""Reducing dirty pages to the bytes that were changed. Reads sources, changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.memory.plan import PAGE, Source
from dask_zbig.storage import extents as ex

__all__ = ["compose", "torn", "trim"]

#: Of a longer run only this much at each end is compared: what is between was written in bulk.
EDGE = 2 << 20
STEP = 64 << 10
#: So few pieces are read one by one; of more, those that are not farther from each other than this are read together.
FEW, NEAR = 4, 16 << 10
#: More separate changes than this in one run of pages are joined to larger ones, which claim what is between them.
#: A leaf of the extent map grows by 56 bytes for each, and is written again by every commit that changes it: for
#: 512, 4096 and 16,384 changes a commit took 4, 19 and 174 ms here, and the next one wrote 29, 230 and 918 KB.
MAX_RANGES = 4096


def compose(extents: npt.NDArray[np.void], sources: Sequence[Source], lo: int, hi: int) -> bytearray:
    """The bytes [lo, hi) that the extents describe."""
    out = bytearray(hi - lo)
    rows = ex.clip(extents, lo, hi)
    if len(rows) <= FEW:
        for start, stop, index, offset in rows.tolist():
            out[start - lo : stop - lo] = sources[index].read(offset, stop - start)
        return out
    # Of each source what lies near each other is read at once: a call for each piece takes longer than the bytes do.
    order = np.lexsort((rows["offset"], rows["segment"]))
    rows = rows[order]
    ends = rows["offset"] + (rows["stop"] - rows["start"])
    apart = rows["segment"][1:] != rows["segment"][:-1]
    apart |= rows["offset"][1:] > ends[:-1] + np.uint64(NEAR)
    borders = [0, *(np.flatnonzero(apart) + 1).tolist(), len(rows)]
    with memoryview(out) as target:
        for first, last in itertools.pairwise(borders):
            _read_run(rows[first:last], int(ends[first:last].max()), sources, target, lo)
    return out


def _read_run(rows: npt.NDArray[np.void], end: int, sources: Sequence[Source], target: memoryview, lo: int) -> None:
    """Put rows of one source, which lie near each other in it and end at `end`, into their places."""
    begin = int(rows["offset"][0])
    with memoryview(sources[int(rows["segment"][0])].read(begin, end - begin)) as data:
        places = (rows["offset"] - begin).tolist(), (rows["start"] - lo).tolist(), (rows["stop"] - lo).tolist()
        for at, start, stop in zip(*places, strict=True):
            target[start:stop] = data[at : at + stop - start]


def trim(
    extents: npt.NDArray[np.void],
    sources: Sequence[Source],
    base: npt.NDArray[np.void],
    base_sources: Sequence[Source],
    granule: int,
    certain: Sequence[tuple[int, int]] = (),
) -> npt.NDArray[np.void]:
    """Reduce runs of dirty pages to the bytes that differ from the base, in elements of `granule` bytes.

    What lies in a range of `certain`, whole elements, counts as different whatever it is.

    Without this a writer would claim, and conflict over, its neighbours' bytes in the same page. An element that
    is not in one run as a whole is claimed in part; `torn` tells what is missing.
    """
    rows: list[tuple[int, int, int, int]] = []
    for start, stop, index, offset in extents.tolist():

        def differing(lo: int, hi: int, index: int = index, shift: int = offset - start) -> ex.Ranges:
            new = sources[index].read(lo + shift, hi - lo)
            return _differing(new, compose(base, base_sources, lo, hi), lo, granule, certain)

        changed = differing(start, stop) if stop - start <= 2 * EDGE else _edges(differing, start, stop)
        if stop - start > 2 * EDGE:
            changed = ex.normalize(changed)
        for lo, hi in _joined(changed, granule).tolist():
            rows.append((lo, hi, index, offset + (lo - start)))
    return ex.coalesce(ex.make(rows))


def torn(extents: npt.NDArray[np.void], granule: int) -> ex.Ranges:
    """The bytes that are not in the extents though others of the same element are.

    Whoever changes bytes of an element must claim all of it, or two transactions that change two fields of it would
    both be kept, if it lies in two pages of which each wrote one. Elements larger than a page are exempt: they
    conflict by the part of them that lies in the pages that were written.

    >>> torn(ex.make([(0, 4, 0, 0), (10, 12, 0, 0)]), 6).tolist()
    [[4, 10]]
    """
    if PAGE % granule == 0 or granule > PAGE:
        return ex.no_ranges()
    claimed = ex.covered(extents)
    head, tail = claimed.astype(np.int64).T
    edges = np.concatenate(
        [np.stack([head // granule * granule, head]), np.stack([tail, -(-tail // granule) * granule])], 1
    )
    return ex.subtract(ex.normalize(edges.T), claimed)


def _joined(ranges: ex.Ranges, granule: int) -> ex.Ranges:
    """At most MAX_RANGES of them: those that are closest to each other are joined."""
    gap = granule
    while len(ranges) > MAX_RANGES:
        gap *= 4
        apart = ranges[1:, 0] - ranges[:-1, 1] > gap
        ranges = np.stack([ranges[np.append(True, apart), 0], ranges[np.append(apart, True), 1]], 1)
    return ranges


def _edges(differing: Callable[[int, int], ex.Ranges], start: int, stop: int) -> ex.Ranges:
    """Compare a long run from both ends, up to EDGE, as far as a step in which every element was changed.

    Or as far as there are so many changes that they will be joined anyway.
    """
    parts = []
    lo, hi, count = start, stop, 0
    while lo < start + EDGE and count <= MAX_RANGES:
        step = differing(lo, lo + STEP)
        parts.append(step)
        count += len(step)
        lo += STEP
        if step.tolist() == [[lo - STEP, lo]]:
            break
    count = 0
    while hi > stop - EDGE and count <= MAX_RANGES:
        step = differing(hi - STEP, hi)
        parts.append(step)
        count += len(step)
        hi -= STEP
        if step.tolist() == [[hi, hi + STEP]]:
            break
    return np.concatenate([*parts, ex.one_range(lo, hi)])


def _one_run(new: bytes, old: bytearray, at: int, granule: int) -> ex.Ranges | None:
    """As `_differing`, where one run of whole elements has changed, as by most small commits; else perhaps None."""
    if granule not in (1, 2, 4, 8) or at % granule or len(new) % granule:
        return None
    word = f"u{granule}"
    changed = np.flatnonzero(np.frombuffer(new, word) != np.frombuffer(old, word))
    first, last = int(changed[0]), int(changed[-1])
    if last - first >= len(changed):
        return None
    return ex.one_range(at + first * granule, at + (last + 1) * granule)


def _differing(new: bytes, old: bytearray, at: int, granule: int, certain: Sequence[tuple[int, int]] = ()) -> ex.Ranges:
    """Ranges of the elements, clipped to these bytes, in which some byte differs, or that are `certain`; sorted."""
    certain = [(max(lo - at, 0), min(hi - at, len(new))) for lo, hi in certain if lo < at + len(new) and hi > at]
    if not certain:
        if new == old:
            return ex.no_ranges()
        few = _one_run(new, old, at, granule)
        if few is not None:
            return few
    first_item = at // granule
    head = at - first_item * granule
    items = -(-(head + len(new)) // granule)
    unequal = np.zeros(items * granule, np.bool_)
    np.not_equal(np.frombuffer(new, np.uint8), np.frombuffer(old, np.uint8), out=unequal[head : head + len(new)])
    for lo, hi in certain:
        unequal[head + lo : head + hi] = True
    wide = np.dtype(f"u{granule}") if granule in (1, 2, 4, 8) else None
    changed: Any
    changed = np.not_equal(unequal.view(wide), 0) if wide is not None else unequal.reshape(-1, granule).any(axis=1)
    turns = np.flatnonzero(changed[1:] != changed[:-1]) + 1
    turns = np.concatenate([[0] if changed[0] else [], turns, [items] if changed[-1] else []]).astype(np.int64)
    ranges = ((turns + first_item) * granule).reshape(-1, 2)
    return np.clip(ranges, at, at + len(new)).astype(np.uint64)
