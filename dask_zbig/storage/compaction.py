"""Which small segments of a leaf to join into a larger one, so that many small commits stay cheap to keep.

A leaf is written whole by every commit that changes it, so it must not refer to too many segments. Segments are
sorted into tiers by size; when a tier of a leaf has `WIDTH` of them, they become one of the next tier; `BLOBS`, where
they become a blob out of blobs. So a byte is written again once a tier, a handful of times in its life, however small
the commits are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dask_zbig.storage.segment import SegmentRef

__all__ = ["BLOB_BYTES", "DONE", "DONE_INLINE", "WIDTH", "to_join"]

WIDTH = 12
#: Blobs are joined sooner: that adds nothing to what every reader of the database goes through.
BLOBS = 8
#: No more than this are joined at once, by one commit: the next ones go on.
MOST = 256
#: The smallest tier is of up to so many bytes, each other one of up to `WIDTH` (or `BLOBS`) times as many as the one
#: before.
_SMALLEST = 512
#: A joined segment of this size becomes a blob, where there are blobs. Then its bytes are not written twice into what
#: every reader of the database goes through, and can be read without being unpickled.
BLOB_BYTES = 8 << 10
#: A segment of this size is not joined again: it is one mapping.
DONE = 2 << 20
#: The same where there are no blobs.
DONE_INLINE = 128 << 10


def to_join(
    extents: npt.NDArray[np.void],
    refs: Sequence[SegmentRef],
    *,
    blobs: bool,
    local: Callable[[SegmentRef], bool] = lambda ref: True,
) -> list[int]:
    """Indices of the segments that one commit should join now; often none.

    Segments count by the bytes of them that are in use, and only if these are less than `DONE`; inline ones, and all if
    there are no blobs, less than `DONE_INLINE`.

    Parameters
    ----------
    blobs : bool
        Whether what is joined may become a blob.
    local
        Whether a segment can be read without asking a server for it: others are left to who has them.
    """
    if len(refs) < BLOBS:
        return []
    sizes = np.bincount(extents["segment"], extents["stop"] - extents["start"], len(refs))
    tiers: dict[int, list[int]] = {}
    for i, size in enumerate(sizes.astype(np.int64).tolist()):
        done = DONE_INLINE if refs[i].inline or not blobs else DONE
        if size < done and (blobs or refs[i].inline or 2 * size < refs[i].length):
            tiers.setdefault(_tier(size, blobs), []).append(i)
    for tier in sorted(tiers):
        width = _width(tier, blobs)
        if len(tiers[tier]) >= width:
            near = [i for i in tiers[tier] if local(refs[i])]
            if len(near) >= width:
                return near[:MOST]
    return []


def _width(tier: int, blobs: bool) -> int:
    """How many segments of a tier are joined."""
    return BLOBS if blobs and tier > 1 else WIDTH


def _limits(blobs: bool, largest: int) -> list[int]:
    """Of each tier but the first, the smallest size: so large that what is joined leaves its tier."""
    limits = [_SMALLEST + 1]
    while limits[-1] <= largest:
        limits.append(limits[-1] * _width(len(limits), blobs))
    return limits


_LIMITS, _LIMITS_INLINE = _limits(True, DONE), _limits(False, DONE_INLINE)


def _tier(size: int, blobs: bool) -> int:
    return bisect_right(_LIMITS if blobs else _LIMITS_INLINE, size)
