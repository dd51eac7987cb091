"""The packed table of a leaf: what goes in comes out, in few bytes; and junk is refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_zbig.errors import FormatError
from dask_zbig.storage import extents as ex
from dask_zbig.storage import packing
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.packing import MOVED, SEGMENT, pack, unpack

from tests import columns  # isort: skip

NO_MOVE = (b"", np.empty(0, MOVED), 0)

sizes = st.integers(1, 5000) | st.sampled_from([1, 8, 1024, 4096, 2 << 20])
places = st.lists(st.tuples(st.integers(0, 3) | sizes, sizes), max_size=12)
numbers = st.integers(0, 2**64 - 1) | st.integers(0, 5000)


def rows_of(runs, base, *columns):
    at, rows = base, []
    for (gap, size), *more in zip(runs, *columns, strict=False):
        if at + gap + size > base + LEAF_BYTES:
            break
        rows.append((at + gap, at + gap + size, *more))
        at += gap + size
    return rows


@st.composite
def tables(draw):
    leaf = draw(st.sampled_from([0, 1, 7, 1 << 20, (1 << 37) - 1]))
    count = draw(st.integers(1, 5))
    runs = draw(places)
    segments = draw(st.lists(st.integers(0, count - 1), min_size=len(runs), max_size=len(runs)))
    offsets = draw(st.lists(numbers, min_size=len(runs), max_size=len(runs)))
    extents = np.array(rows_of(runs, leaf * LEAF_BYTES, segments, offsets), ex.EXTENT)
    table = draw(st.lists(st.tuples(numbers, numbers), min_size=count, max_size=count))
    moved = draw(places)
    oids = draw(st.lists(st.binary(min_size=8, max_size=8), min_size=len(moved), max_size=len(moved)))
    moved = np.array(rows_of(moved, leaf * LEAF_BYTES, oids, offsets + [0] * 12), MOVED)
    to = draw(st.binary(min_size=8, max_size=8)) if len(moved) and len(extents) else b""
    return extents, np.array(table, SEGMENT), to, moved if to else NO_MOVE[1], draw(st.integers(0, 255)) if to else 0


@given(tables())
def test_round_trip(table):
    extents, segments, to, moved, age = table
    packed = pack(*table)
    again = unpack(packed, len(segments))
    assert again[0].tobytes() == extents.tobytes()
    assert again[1].tobytes() == segments.tobytes()
    assert again[2] == to
    assert again[3].tobytes() == moved.tobytes()
    assert again[4] == age or not to
    assert not again[0].flags.writeable


@given(tables(), st.data())
def test_junk(table, data):
    """Whatever was changed: an error of ours, or a table that can be packed."""
    packed = bytearray(pack(*table))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    packed = bytes(packed)[: len(packed) - data.draw(st.sampled_from([0, 0, 0, 1, 9]))]
    count = len(table[1]) + data.draw(st.sampled_from([0, 0, 0, 1, -1]))
    try:
        extents, segments, *_ = unpack(packed, count)
    except FormatError:
        return
    assert len(segments) == count
    assert not len(extents) or int(extents["segment"].max()) < count


@given(tables())
def test_the_columns_are_those_of_the_model(table):
    extents, segments, *_ = table
    base = int(extents["start"][0]) // LEAF_BYTES * LEAF_BYTES if len(extents) else 0
    found = packing._columns(extents, segments["length"], base)
    assert found == columns.columns(extents.tolist(), segments["length"].tolist(), base)


@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from([0, 7, (1 << 37) - 1]), st.data())
def test_any_columns_are_read_as_by_the_model(n, count, leaf, data):
    """Compressed junk would hardly ever be read; this is."""
    size = n * columns.ROW.size + 9 * count
    junk = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    for k in range(8 * n, 12 * n):  # the segments: or none of them would be any
        junk[k] = data.draw(st.integers(0, count + 1)) if k < 9 * n else 0
    taken = bytes(junk)
    assert outcome(lambda: packing._rows_of(taken, n, count, leaf * LEAF_BYTES)) == outcome(
        lambda: columns.rows(taken, n, count, leaf * LEAF_BYTES)
    )


# guard: table.c `vote`, its check; removed -> writes outside of what it has allocated (ASan), or a wrong table
def test_an_extent_of_no_segment_is_not_packed():
    extents = ex.make([(0, 1, 0, 0), (1, 2, 3, 0)])
    with pytest.raises(FormatError, match="segment 3, of 2"):
        packing._columns(extents, np.array([1, 1], np.uint64), 0)
    with pytest.raises(FormatError, match="segment 3, of 2"):
        packing.put(extents, 2, 0, 1, 0)


def test_extents_of_two_leaves_are_not_packed():
    """Gaps of 4 GiB would not fit. Three damaged states may be merged to this."""
    extents = ex.make([(0, 1, 0, 0), (LEAF_BYTES + 5, LEAF_BYTES + 6, 0, 0)])
    with pytest.raises(FormatError, match=f"up to {LEAF_BYTES + 6} in leaf 0"):
        pack(extents, np.array([(10, 0)], SEGMENT), *NO_MOVE)


@given(st.data())
def test_put(data):
    runs = data.draw(places)
    count = data.draw(st.integers(1, 5))
    segments = data.draw(st.lists(st.integers(0, count - 1), min_size=len(runs), max_size=len(runs)))
    offsets = data.draw(st.lists(st.integers(0, 5000), min_size=len(runs), max_size=len(runs)))
    rows = rows_of(runs, 0, segments, offsets)
    start = data.draw(st.integers(0, (rows[-1][1] if rows else 0) + 10))
    stop = start + data.draw(sizes)
    extents, order = packing.put(ex.make(rows), count, start, stop, 77)
    assert (extents.tolist(), order) == columns.put(rows, count, start, stop, 77)


def outcome(call):
    try:
        return [x.tolist() if isinstance(x, np.ndarray) else x for x in call()]
    except FormatError as error:
        return str(error)


def test_nothing():
    assert pack(ex.empty(), np.empty(0, SEGMENT), *NO_MOVE) == b""
    extents, segments, *rest = unpack(b"", 0)
    assert (len(extents), len(segments)) == (0, 0)
    assert rest[0] == b""
    with pytest.raises(FormatError, match="0 bytes"):
        unpack(b"", 1)


# guard: packing.py `_decompressed`, its bound; removed -> what comes is as large as it likes
def test_a_bomb_is_not_unpacked():
    """A table that says it is small, and is not."""
    packed = pack(ex.make([(0, 10, 0, 0)]), np.array([(10, 0)], SEGMENT), *NO_MOVE)
    head = packed[: 17 + 8]
    with pytest.raises(FormatError, match="of the 29 bytes"):
        unpack(head + zlib.compress(bytes(1 << 27)), 1)


def test_regular_appends_take_hardly_more_than_their_checksums():
    n = 100
    extents = np.array([(i * 1024, (i + 1) * 1024, i, 0) for i in range(n)], ex.EXTENT)
    checksums = np.random.default_rng(1).integers(0, 2**63, n)
    segments = np.array([(1024, c) for c in checksums], SEGMENT)
    oids = [(1000 + 3 * i).to_bytes(8, "big") for i in range(n)]
    moved = np.array([(i * 1024, (i + 1) * 1024, oid, 0) for i, oid in enumerate(oids)], MOVED)
    assert len(pack(extents, segments, *NO_MOVE)) < 8 * n + 150
    assert len(pack(extents, segments, oids[0], moved, 1)) < 8 * n + 350


@pytest.mark.parametrize("joined", [False, True])
def test_a_random_change_takes_few_bytes(joined):
    """Eight bytes at random of a blob of 64 MiB, each in a segment of its own, or all in one."""
    n = 200
    starts = np.sort(np.random.default_rng(2).choice(LEAF_BYTES // 4096, n, replace=False)) * 4096
    rows, at = [], 0
    for i, start in enumerate(starts.tolist()):
        rows += [(at, start, 0, at), (start, start + 8, *((1, 8 * i) if joined else (i + 1, 0)))]
        at = start + 8
    extents = ex.make([row for row in [*rows, (at, LEAF_BYTES, 0, at)] if row[0] < row[1]])
    segments = np.zeros(2 if joined else n + 1, SEGMENT)
    assert len(pack(extents, segments, *NO_MOVE)) - 8 * len(segments) < (5 if joined else 6) * n + 150
