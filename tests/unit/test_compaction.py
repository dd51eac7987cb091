"""Which segments a leaf joins: few are kept, and a byte is copied a handful of times."""

from __future__ import annotations

import itertools

import pytest
from ZODB.blob import Blob

from dask_zbig.storage import extents as ex
from dask_zbig.storage.compaction import BLOB_BYTES, WIDTH, to_join
from dask_zbig.storage.segment import InlineSegment, SegmentRef


def refs(*lengths):
    return [SegmentRef(InlineSegment(b""), n, 0) for n in lengths]


def row(lengths):
    """Extents one after the other, one a segment."""
    ends = list(itertools.accumulate(lengths, initial=0))
    return ex.make([(a, b, i, 0) for i, (a, b) in enumerate(itertools.pairwise(ends))])


def test_few_are_left_alone():
    assert to_join(ex.empty(), []) == []
    lengths = [100] * (WIDTH - 1)
    assert to_join(row(lengths), refs(*lengths)) == []


def test_many_small_ones_are_joined():
    lengths = [100] * WIDTH
    assert sorted(to_join(row(lengths), refs(*lengths))) == list(range(WIDTH))


def test_a_large_one_stays_out_of_it():
    lengths = [1 << 16] * 3 + [100] * WIDTH
    assert sorted(to_join(row(lengths), refs(*lengths))) == list(range(3, WIDTH + 3))


def test_blobs_and_what_became_one_are_never_joined():
    lengths = [1000] * WIDTH
    assert to_join(row(lengths), [SegmentRef(Blob(), n, 0) for n in lengths]) == []
    lengths = [BLOB_BYTES] * WIDTH
    assert to_join(row(lengths), refs(*lengths)) == []


def test_blobs_of_which_little_is_left_are_joined():
    lengths = [1000] * WIDTH
    little = [SegmentRef(Blob(), 200_000, 0) for _ in lengths]
    assert sorted(to_join(row(lengths), little)) == list(range(WIDTH))
    much = [BLOB_BYTES] * WIDTH
    assert to_join(row(much), [SegmentRef(Blob(), 10 * n, 0) for n in much]) == []


@pytest.mark.parametrize("size", [1, 1024, 60_000])
def test_many_commits(size):
    """As flush does it: append a segment, join what should be joined."""
    lengths, copied, most = [], 0, 0
    commits = 5000
    for _ in range(commits):
        lengths.append(size)
        chosen = to_join(row(lengths), refs(*lengths))
        if chosen:
            total = sum(lengths[i] for i in chosen)
            copied += total
            lengths = [n for i, n in enumerate(lengths) if i not in chosen]
            if total < BLOB_BYTES:
                lengths.append(total)
            # (else it is a blob, and no longer counts)
        most = max(most, len(lengths))
    assert most <= 4 * WIDTH
    assert copied <= 5 * commits * max(size, 256)  # (the smallest tier is of up to 4 KiB)
