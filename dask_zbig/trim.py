"""Reducing dirty pages to the bytes that were changed. Reads sources, changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.memory.plan import Source
from dask_zbig.storage import extents as ex

__all__ = ["compose", "trim"]

#: Of a longer run only this much at each end is compared: what is between was written in bulk.
EDGE = 2 << 20
STEP = 64 << 10
#: More separate changes than this in one run are joined to larger ones: the extent map must stay small.
MAX_RANGES = 512


def compose(extents: npt.NDArray[np.void], sources: Sequence[Source], lo: int, hi: int) -> bytearray:
    """The bytes [lo, hi) that the extents describe."""
    out = bytearray(hi - lo)
    for start, stop, index, offset in ex.clip(extents, lo, hi).tolist():
        out[start - lo : stop - lo] = sources[index].read(offset, stop - start)
    return out


def trim(
    extents: npt.NDArray[np.void],
    sources: Sequence[Source],
    base: npt.NDArray[np.void],
    base_sources: Sequence[Source],
    granule: int,
) -> npt.NDArray[np.void]:
    """Reduce runs of dirty pages to the bytes that differ from the base, in whole elements of `granule` bytes.

    Without this a writer would claim, and conflict over, its neighbours' bytes in the same page.
    """
    rows: list[tuple[int, int, int, int]] = []
    for start, stop, index, offset in extents.tolist():

        def differing(lo: int, hi: int, index: int = index, shift: int = offset - start) -> list[list[int]]:
            new = sources[index].read(lo + shift, hi - lo)
            return _differing(new, compose(base, base_sources, lo, hi), lo, granule)

        changed = differing(start, stop) if stop - start <= 2 * EDGE else _edges(differing, start, stop)
        for lo, hi in ex.normalize(np.array(changed, np.uint64).reshape(-1, 2)).tolist():
            rows.append((lo, hi, index, offset + (lo - start)))
    return ex.coalesce(ex.make(rows))


def _edges(differing: Callable[[int, int], list[list[int]]], start: int, stop: int) -> list[list[int]]:
    """Compare a long run from both ends, up to EDGE, as far as a step in which every element was changed."""
    changed: list[list[int]] = []
    lo, hi = start, stop
    while lo < start + EDGE:
        step = differing(lo, lo + STEP)
        changed += step
        lo += STEP
        if step == [[lo - STEP, lo]]:
            break
    while hi > stop - EDGE:
        step = differing(hi - STEP, hi)
        changed += step
        hi -= STEP
        if step == [[hi, hi + STEP]]:
            break
    return [*changed, [lo, hi]]


def _differing(new: bytes, old: bytearray, at: int, granule: int) -> list[list[int]]:
    """Ranges of the elements, clipped to these bytes, in which some byte differs."""
    if new == old:
        return []
    first_item = at // granule
    head = at - first_item * granule
    items = -(-(head + len(new)) // granule)
    unequal = np.zeros(items * granule, np.bool_)
    np.not_equal(np.frombuffer(new, np.uint8), np.frombuffer(old, np.uint8), out=unequal[head : head + len(new)])
    wide = np.dtype(f"u{granule}") if granule in (1, 2, 4, 8) else None
    changed: Any
    changed = np.not_equal(unequal.view(wide), 0) if wide is not None else unequal.reshape(-1, granule).any(axis=1)
    turns = np.flatnonzero(changed[1:] != changed[:-1]) + 1
    turns = np.concatenate([[0] if changed[0] else [], turns, [items] if changed[-1] else []]).astype(np.int64)
    lo, hi = turns[0::2], turns[1::2]
    gap = 1
    while len(lo) > MAX_RANGES:
        gap *= 4
        apart = lo[1:] - hi[:-1] > gap
        lo, hi = lo[np.append(True, apart)], hi[np.append(apart, True)]
    lo = np.maximum((lo + first_item) * granule, at)
    hi = np.minimum((hi + first_item) * granule, at + len(new))
    return np.stack([lo, hi], 1).tolist()  # type: ignore[no-any-return]
