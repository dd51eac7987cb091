"""Which segments a leaf joins: few are kept, and a byte is copied a handful of times."""

from __future__ import annotations

import itertools

import pytest
from ZODB.blob import Blob

from dask_zbig.storage import extents as ex
from dask_zbig.storage.compaction import BLOB_BYTES, BLOBS, DONE, DONE_INLINE, WIDTH, _tier, _width, to_join
from dask_zbig.storage.segment import InlineSegment, SegmentRef


def refs(*lengths):
    return [SegmentRef(InlineSegment(b""), n, 0) for n in lengths]


def row(lengths):
    """Extents one after the other, one a segment."""
    ends = list(itertools.accumulate(lengths, initial=0))
    return ex.make([(a, b, i, 0) for i, (a, b) in enumerate(itertools.pairwise(ends))])


@pytest.mark.parametrize("blobs", [True, False])
def test_few_are_left_alone(blobs):
    assert to_join(ex.empty(), [], blobs=blobs) == []
    lengths = [100] * (WIDTH - 1)
    assert to_join(row(lengths), refs(*lengths), blobs=blobs) == []


@pytest.mark.parametrize("blobs", [True, False])
def test_many_small_ones_are_joined(blobs):
    lengths = [100] * WIDTH
    assert sorted(to_join(row(lengths), refs(*lengths), blobs=blobs)) == list(range(WIDTH))


def test_a_large_one_stays_out_of_it():
    lengths = [1 << 16] * 3 + [100] * WIDTH
    assert sorted(to_join(row(lengths), refs(*lengths), blobs=True)) == list(range(3, WIDTH + 3))


@pytest.mark.parametrize(("blobs", "size"), [(True, DONE), (False, DONE_INLINE)])
def test_what_is_large_enough_is_never_joined(blobs, size):
    def segments(lengths):
        return [SegmentRef(Blob(), n, 0) for n in lengths] if blobs else refs(*lengths)

    lengths = [size] * WIDTH
    assert to_join(row(lengths), segments(lengths), blobs=blobs) == []
    lengths = [size - 1] * WIDTH
    assert to_join(row(lengths), segments(lengths), blobs=blobs) != []


def test_blobs_are_joined_to_larger_ones():
    lengths = [BLOB_BYTES] * (BLOBS - 1)
    segments = [SegmentRef(Blob(), n, 0) for n in lengths]
    assert to_join(row(lengths), segments, blobs=True) == []
    lengths = [BLOB_BYTES] * BLOBS
    segments = [SegmentRef(Blob(), n, 0) for n in lengths]
    assert sorted(to_join(row(lengths), segments, blobs=True)) == list(range(BLOBS))
    assert to_join(row(lengths), segments, blobs=False) == []  # (there were blobs once: these are no small objects)


# guard: `_tier` divides by the width of the tier that is entered; by that of the one before -> the same tier again
@pytest.mark.parametrize("blobs", [True, False])
def test_what_is_joined_leaves_its_tier(blobs):
    for size in range(1, 100_000, 7):
        tier = _tier(size, blobs)
        assert _tier(size * _width(tier, blobs), blobs) > tier or size * _width(tier, blobs) <= 512, size


def test_blobs_of_which_little_is_left_are_joined():
    lengths = [1000] * WIDTH
    little = [SegmentRef(Blob(), 200_000, 0) for _ in lengths]
    for blobs in (True, False):
        assert sorted(to_join(row(lengths), little, blobs=blobs)) == list(range(WIDTH))


@pytest.mark.parametrize("blobs", [True, False])
@pytest.mark.parametrize("size", [1, 1024, 60_000])
def test_many_commits(size, blobs):
    """As flush does it: append a segment, join what should be joined."""
    lengths, copied, most = [], 0, 0
    commits = 5000
    for _ in range(commits):
        lengths.append(size)
        chosen = to_join(row(lengths), refs(*lengths), blobs=blobs)
        if chosen:
            total = sum(lengths[i] for i in chosen)
            copied += total
            lengths = [n for i, n in enumerate(lengths) if i not in chosen]
            if total < DONE_INLINE:
                lengths.append(total)
            # (else it no longer counts)
        most = max(most, len(lengths))
    assert most <= 4 * WIDTH
    assert copied <= 5 * commits * max(size, 64)  # (the smallest tier is of up to 512 bytes)
