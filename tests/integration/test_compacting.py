"""Compaction on demand: the bytes stay what they are, the pieces become few, others may go on."""

from __future__ import annotations

import numpy as np
import pytest
from ZODB.POSException import ConflictError

from dask_zbig import compacting
from dask_zbig.compacting import compact_array
from dask_zbig.errors import LoadError
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.survey import survey

MIB = 1 << 20


def compact(client, name="A", **options):
    return compact_array(client.connection.db(), client.root[name]._p_oid, **options)


def pieces(array):
    seen = survey(array._file, array.nbytes)
    return seen.extents, len(seen.segments)


def test_many_small_commits(clients):
    clients.new(1 << 20, "u1")
    one = clients.connect()
    A = one.root["A"]
    rng = np.random.default_rng(0)
    expected = np.zeros(A.shape, "u1")
    for i in range(40):
        at = int(rng.integers(0, len(expected) - 1000))
        A[at : at + 700] = expected[at : at + 700] = i + 1
        one.commit()
    view = A[:]
    before = pieces(A)
    report = compact(one)
    assert (report.extents[0], report.segments[0]) == before
    one.begin()
    assert pieces(A) == (report.extents[1], report.segments[1])
    assert report.segments[1] == 1 < before[1]
    assert report.transactions == 1
    assert np.array_equal(view, expected)
    again = compact(one)
    assert (again.bytes, again.transactions) == (0, 0)
    view[5] = 77
    one.commit()
    other = clients.connect(other=True)
    other.begin()
    expected[5] = 77
    assert np.array_equal(other.root["A"][:], expected)


def test_an_array_that_was_written_to_bits(local):
    """A dense blob with many small changes in it is copied whole; and the old one can be packed away."""
    local.new(8 * MIB, "u1")
    one = local.connect()
    A = one.root["A"]
    A[:] = 1
    one.commit()
    expected = np.ones(A.shape, "u1")
    for start in range(0, 400, 100):
        for i in range(start, start + 100):
            A[i * 20_000] = expected[i * 20_000] = 2
        one.commit()
    assert pieces(A)[0] > 700
    report = compact(one)
    one.begin()
    assert (report.extents[1], report.segments[1]) == (1, 1)
    assert report.bytes == 8 * MIB
    one.abort()
    one.connection.db().pack()
    one.connection.cacheMinimize()
    other = local.connect()
    assert np.array_equal(other.root["A"][:], expected)


def test_blobs_of_which_little_is_left(local):
    local.new(4 * MIB, "u1")
    one = local.connect()
    A = one.root["A"]
    A[:] = 1
    one.commit()
    A[MIB:] = 2
    one.commit()
    count, size, live = survey(A._file, A.nbytes).kind(inline=False)
    assert count == 2
    assert size > 6 * MIB
    assert live == 4 * MIB
    report = compact(one)
    assert report.bytes == MIB
    one.begin()
    count, size, live = survey(A._file, A.nbytes).kind(inline=False)
    assert (count, live) == (2, 4 * MIB)
    assert size < 6 * MIB
    assert compact(one).bytes == 0
    assert A[:].sum() == MIB + 6 * MIB


def test_a_blob_that_several_leaves_share_is_not_sparse(local):
    local.new(2 * LEAF_BYTES, "u1")
    one = local.connect()
    A = one.root["A"]
    A[LEAF_BYTES - 4 * MIB : LEAF_BYTES + MIB] = 1  # one fifth of it is in the second leaf
    one.commit()
    assert pieces(A) == (2, 1)
    assert compact(one).bytes == 0


def test_bounded_transactions(local):
    local.new(4 * LEAF_BYTES, "u1")
    one = local.connect()
    A = one.root["A"]
    for leaf in range(4):
        for i in range(5):
            A[leaf * LEAF_BYTES + i * 100] = i + 1
            one.commit()
    told = []
    report = compact(one, transaction_size=6, progress=lambda done, total: told.append((done, total)))
    assert report.transactions == 2  # two leaves of five bytes each
    assert told == [(2, 4), (4, 4)]
    assert report.segments == (20, 4)
    one.begin()
    assert A[:].sum() == 4 * 15


def test_writers_go_on(merging):
    """Somebody changes the array between any two steps, also another byte of the same leaf."""
    merging.new(1000, "u1")
    one, A, two, B = merging.pair()
    for i in range(10):
        A[i] = i + 1
        one.commit()
    two.begin()
    B[500] = 5
    compact(one)
    two.commit()  # of a byte that was only moved: it is no conflict
    one.begin()
    assert A[:10].tolist() == list(range(1, 11))
    assert A[500] == 5


def test_conflicts_are_tried_again(local, monkeypatch):
    local.new(100_000, "u1")
    one, A, two, B = local.pair()

    def scatter():  # more pieces than a leaf notes when it moves them
        for i in range(4):
            A[i * 100 :: 1000] = i + 1
            one.commit()

    scatter()
    run, tried = compacting._Batch.run, []

    def disturbed(self, indices, first, size):
        stop = run(self, indices, first, size)
        if len(tried) < most:
            two.begin()
            B[0] = 100 + len(tried)  # a byte that is being moved
            two.commit()
            tried.append(1)
        return stop

    monkeypatch.setattr(compacting._Batch, "run", disturbed)
    most = 2
    assert compact(one).segments[1] == 1
    one.begin()
    assert A[0] == 101
    scatter()
    tried.clear()
    most = compacting.TRIES
    with pytest.raises(ConflictError):
        compact(one)


def test_a_segment_that_cannot_be_read(local, monkeypatch):
    local.new(1000, "u1")
    one = local.connect()
    A = one.root["A"]
    for i in range(4):
        A[i] = i + 1
        one.commit()

    def lost(*_):
        raise LoadError("lost")

    with monkeypatch.context() as m:
        m.setattr("dask_zbig.storage.reader.InlineSource.read", lost)
        with pytest.raises(LoadError):
            compact(one)
    one.begin()
    assert A[:4].tolist() == [1, 2, 3, 4]
    assert pieces(A) == (4, 4)
    assert local.scratch() == []


def test_order_and_dtype_do_not_matter(local):
    local.new((100, 50), [("a", "i4"), ("b", "f8")], "F")
    one = local.connect()
    A = one.root["A"]
    expected = np.zeros((100, 50), A.dtype)
    for i in range(20):
        A["b"][i, i] = expected["b"][i, i] = i + 1
        one.commit()
    compact(one)
    one.begin()
    assert np.array_equal(A[...], expected)
