"""How arrays are shown: `info`, and the picture in a notebook."""

from __future__ import annotations

import re
import time
import xml.dom.minidom

import numpy as np
import pytest
import transaction

import dask_zbig as dz
from dask_zbig.array.display import BINS, LEAVES
from dask_zbig.memory.states import states
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.reader import BlobSource, InlineSource
from dask_zbig.storage.segment import InlineSegment, SegmentRef
from dask_zbig.storage.survey import survey

MIB = 1 << 20


@pytest.fixture
def conn(tmp_path):
    db = dz.open(tmp_path / "x.fs")
    manager = transaction.TransactionManager()
    conn = db.open(manager)
    yield conn
    manager.abort()
    if conn.opened is not None:
        conn.close()
    db.close()


def stored(conn, *args, **kwargs):
    conn.root()["A"] = A = dz.ZBigArray(*args, **kwargs)
    conn.transaction_manager.commit()
    return A


def parts(bins):
    """The parts of a picture that are not empty."""
    return [i for i, part in enumerate(bins) if part]


def test_a_new_array_is_shown_before_it_is_stored():
    A = dz.ZBigArray((8, MIB), "u1")
    info = A.info()
    assert (info.state, info.nbytes, info.stored, info.changed, info.snapshot) == (
        "not stored yet",
        8 * MIB,
        0,
        0,
        None,
    )
    A[2] = 1
    assert A.info().changed == MIB
    assert parts(A.info().picture.changed) == [*range(2 * BINS // 8, 3 * BINS // 8)]
    assert "not stored yet" in str(A.info())


def test_what_is_stored_changed_and_mapped(conn):
    A = stored(conn, (64, MIB), "u1")
    A[8:16] = 1
    conn.transaction_manager.commit()
    info = A.info()
    assert (info.state, info.stored, info.extents, info.segments, info.inline) == ("stored", 8 * MIB, 1, 1, 0)
    assert (info.changed, info.exact) == (0, True)
    assert parts(info.picture.stored) == [*range(8, 16)]
    assert info.tid == conn.db().lastTransaction().hex()
    assert abs(info.snapshot.timestamp() - time.time()) < 60

    view = A[24:32]
    view[4, :10] = 1  # a page, of a block that is 2 MiB
    info = A.info()
    assert 4096 <= info.changed <= 2 * MIB
    assert 28 in parts(info.picture.changed)
    assert set(parts(info.picture.changed)) <= {28, 29}
    assert set(range(24, 32)) <= set(parts(info.picture.mapped))
    conn.transaction_manager.savepoint()
    assert parts(A.info().picture.changed) == parts(info.picture.changed)
    conn.transaction_manager.abort()
    assert A.info().changed == 0
    assert A.info().stored == 8 * MIB


def test_nothing_is_read_and_nothing_changes(conn, monkeypatch):
    A = stored(conn, (64, MIB), "u1")
    A[:32] = 1
    conn.transaction_manager.commit()
    other = conn.db().open(transaction.TransactionManager())
    A = other.root()["A"]

    def read(*_):
        raise AssertionError("data was read")

    for kind in (BlobSource, InlineSource):
        monkeypatch.setattr(kind, "read", read)
        monkeypatch.setattr(kind, "descriptor", read)
    assert A.info().stored == 32 * MIB
    assert A._repr_html_()
    assert A.info().mapped == 0
    assert A._open().space.windows() == []
    assert not other._registered_objects
    other.close()


def test_a_terabyte_with_a_bit_in_it(conn):
    A = stored(conn, 1 << 40, "u1")
    A[1 << 39] = 1
    conn.transaction_manager.commit()
    info = A.info()
    assert (info.stored, info.exact) == (1, True)
    assert parts(info.picture.stored) == [BINS // 2]
    assert "(< 1%)" in str(info)


def full(A, count):
    """Write `count` leaves of one extent each, without the data."""
    ref = SegmentRef(InlineSegment(b"x"), 1, 0)
    for index in range(count):
        at = index * LEAF_BYTES
        A._file.leaf(index).splice(ex.make([(at, at + 1, 0, 0)]), [ref])


def test_of_a_large_map_only_a_part_is_looked_at(conn):
    A = stored(conn, 4 * LEAVES * LEAF_BYTES, "u1")
    full(A, 4 * LEAVES)
    conn.transaction_manager.commit()
    conn.cacheMinimize()
    started = conn.getTransferCounts(True) and conn.getTransferCounts()[0]
    info = A.info()
    loaded = conn.getTransferCounts()[0] - started
    assert not info.exact
    assert 0 < info.stored < 4 * LEAVES
    assert len(parts(info.picture.stored)) == BINS
    assert loaded < LEAVES
    assert "at least" in str(info)
    exact = A.info(exact=True)
    assert (exact.exact, exact.stored, exact.extents, exact.segments) == (True, 4 * LEAVES, 4 * LEAVES, 1)


def test_many_extents(conn):
    A = stored(conn, LEAF_BYTES, "u1")
    rows = [(i * 600, i * 600 + 1, i, 0) for i in range(100_000)]
    A._file.leaf(0).splice(ex.make(rows), [SegmentRef(InlineSegment(b""), 1, 0) for _ in rows])
    started = time.thread_time()
    text = A._repr_html_()
    assert time.thread_time() - started < 20  # it takes 0.2 s
    assert "100,000 in 100,000 segments" in text
    conn.transaction_manager.abort()


def test_what_is_cut_off_is_not_counted(conn):
    A = stored(conn, 4 * MIB, "u1")
    A[:] = 1
    conn.transaction_manager.commit()
    A.resize(MIB)
    assert (A.info().nbytes, A.info().stored) == (MIB, MIB)
    A.resize(4 * MIB)
    assert A.info().stored == MIB
    assert [part > 0.9 for part in A.info().picture.stored] == [True] * (BINS // 4) + [False] * (BINS * 3 // 4)


def test_closed(conn):
    A = stored(conn, (3, 4), "i2", "F")
    conn.close()
    info = A.info()
    assert (info.state, info.shape, info.dtype, info.order) == ("connection closed", (3, 4), "int16", "F")
    assert info.stored is None
    assert "connection closed" in A._repr_html_()


@pytest.mark.parametrize("shape", [(), 0, (0, 5), (1,)])
def test_small_ones(shape):
    for cls in (dz.ZBigArray, dz.RAMArray):
        A = cls(shape, "f4")
        assert A.info().nbytes == A.nbytes
        text = A._repr_html_()
        xml.dom.minidom.parseString(text)
        assert ("svg" in text) == (cls is dz.ZBigArray and A.nbytes > 0)  # of nothing there is no picture


def test_what_is_there_at_all_can_be_seen(conn):
    """Also in a dark theme."""
    A = stored(conn, (1 << 20, 1 << 20), "f8")
    A[1 << 19] = 1
    document = xml.dom.minidom.parseString(A._repr_html_())
    bars = [rect for rect in document.getElementsByTagName("rect") if rect.getAttribute("fill") == "#e07b39"]
    assert [float(rect.getAttribute("fill-opacity")) >= 0.4 for rect in bars] == [True]


def test_in_memory():
    info = dz.RAMArray((2, 3), "i4").info()
    assert (info.state, info.stored, info.picture) == ("in memory", None, None)
    assert "svg" not in info._repr_html_()


def test_html_is_well_formed_and_says_what_the_text_says(conn):
    A = stored(conn, (1000, 1000), [("a<b>", "f8"), ("&", "i4"), ("x" * 60, "i4")])
    A[100:200] = np.ones(1000, A.dtype)
    text = A._repr_html_()
    document = xml.dom.minidom.parseString(text)
    assert len(document.getElementsByTagName("svg")) == 1
    cells = [getattr(td.firstChild, "data", "") for td in document.getElementsByTagName("td")]
    for name, value in A.info().rows():
        assert name in text
        assert value in cells
    assert "a&lt;b&gt;" in text
    bars = [rect for rect in document.getElementsByTagName("rect") if rect.getAttribute("fill").startswith("#")]
    assert {rect.getAttribute("fill") for rect in bars} == {"#e07b39", "#5aa469"}  # nothing is stored


def test_as_plain_values(conn):
    A = stored(conn, (2, 3))
    plain = A.info().to_dict()
    assert plain["shape"] == [2, 3]
    assert re.match(r"\d{4}-\d\d-\d\dT", plain["snapshot"])


def test_states_are_the_kernels(conn):
    A = stored(conn, (64, MIB), "u1")
    view = A[:]
    (window,) = A._open().space.windows()
    mapped, dirty = states([window])
    assert ex.total(ex.intersect(ex.normalize(mapped), ex.one_range(0, A.nbytes))) == A.nbytes
    assert dirty == []
    view[10] = 1
    _, dirty = states([window])
    lo, hi = ex.normalize(dirty).tolist()[0]
    assert lo <= 10 * MIB < 11 * MIB <= hi
    assert states([]) == ([], [])
    conn.transaction_manager.abort()


def test_survey_in_bins(conn):
    A = stored(conn, 3 * LEAF_BYTES, "u1")
    A[LEAF_BYTES - 10 : LEAF_BYTES + 20] = 1
    conn.transaction_manager.commit()
    seen = survey(A._file, A.nbytes, bins=3)
    assert (seen.stored, seen.extents, seen.leaves, seen.fullest) == (30, 2, 3, 1)
    assert seen.bins == (10 / LEAF_BYTES, 20 / LEAF_BYTES, 0)
    assert seen.kind(inline=True) == (1, 30, 30)
    assert seen.kind(inline=False) == (0, 0, 0)
    assert survey(A._file, LEAF_BYTES).stored == 10
