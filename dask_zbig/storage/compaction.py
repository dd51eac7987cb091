"""Which small segments of a leaf to join into a larger one, so that many small commits stay cheap to keep.

A leaf is written whole by every commit that changes it, so it must not refer to too many segments. Segments are
sorted into tiers by size; when a tier of a leaf has `WIDTH` of them, they become one of the next tier. So a byte
is written again once a tier, a handful of times in its life, however small the commits are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dask_zbig.storage.segment import SegmentRef

__all__ = ["BLOB_BYTES", "to_join"]

WIDTH = 16
#: No more than this are joined at once, by one commit: the next ones go on.
MOST = 256
_SMALLEST = 1 << 12
#: A joined segment of this size becomes a blob, where there are blobs, and is not joined again.
BLOB_BYTES = 128 << 10


def to_join(extents: npt.NDArray[np.void], refs: Sequence[SegmentRef]) -> list[int]:
    """Indices of the segments that one commit should join now; often none.

    Inline segments count, and blobs most of which was overwritten, by the bytes of them that are in use, if these
    are fewer than `BLOB_BYTES`.
    """
    sizes = np.zeros(len(refs), np.int64)
    np.add.at(sizes, extents["segment"], (extents["stop"] - extents["start"]).astype(np.int64))
    tiers: dict[int, list[int]] = {}
    for i, ref in enumerate(refs):
        size = int(sizes[i])
        if (ref.length if ref.inline else size) < BLOB_BYTES and (ref.inline or 2 * size < ref.length):
            tiers.setdefault(_tier(size), []).append(i)
    chosen: list[int] = []
    for tier in sorted(tiers):
        chosen += tiers[tier]
        if len(chosen) >= WIDTH:
            return chosen[:MOST]
        if chosen and len(tiers[tier]) < WIDTH:
            chosen = []
    return []


def _tier(size: int) -> int:
    tier = 0
    while size > _SMALLEST:
        size //= WIDTH
        tier += 1
    return tier
