"""The states are, byte by byte, what `dask_zbig/storage/format.py` says; once more, to notice any change."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import transaction
import xxhash

import dask_zbig as dz
from dask_zbig.cluster import staging
from dask_zbig.storage import format as fmt
from dask_zbig.storage.segment import InlineSegment
from dask_zbig.storage.tree import ExtentLeaf, ExtentNode, Journal, Truncation, ZBigFile
from tests.hostile import unpacked

LEAF = 64 << 20


@pytest.fixture
def connection():
    db = dz.open("memory://")
    connection = db.open(transaction.TransactionManager())
    yield connection
    connection.transaction_manager.abort()
    connection.close()
    db.close()


def state(obj):
    obj._p_activate()
    return obj.__getstate__()


def test_constants():
    assert (fmt.VERSION, fmt.LEAF_BYTES, fmt.FANOUT, fmt.MAX_DEPTH) == (1, LEAF, 1024, 4)
    paths = {
        dz.ZBigArray: "dask_zbig.array.zbigarray.ZBigArray",
        dz.ArrayRef: "dask_zbig.array.arrayref.ArrayRef",
        ZBigFile: "dask_zbig.storage.tree.ZBigFile",
        ExtentNode: "dask_zbig.storage.tree.ExtentNode",
        ExtentLeaf: "dask_zbig.storage.tree.ExtentLeaf",
        Truncation: "dask_zbig.storage.tree.Truncation",
        Journal: "dask_zbig.storage.tree.Journal",
        InlineSegment: "dask_zbig.storage.segment.InlineSegment",
        staging.StagingJob: "dask_zbig.cluster.staging.StagingJob",
        staging.Lease: "dask_zbig.cluster.staging.Lease",
        staging.StagingSlot: "dask_zbig.cluster.staging.StagingSlot",
    }
    for cls, path in paths.items():
        assert f"{cls.__module__}.{cls.__qualname__}" == path
        assert path.rpartition(".")[2] in fmt.__doc__


def test_states(connection):
    root = connection.root()
    root["A"] = A = dz.ZBigArray((3, 4), [("x", "<i4"), ("y", ">f8", (2,))], order="F")
    A[1, 2] = (7, (1, 2))
    connection.transaction_manager.commit()
    root["r"] = dz.ArrayRef(A[1:, 2]["x"])
    assert state(A) == (1, (3, 4), [("x", "<i4"), ("y", ">f8", (2,))], "F", A._file)
    A.units = "m"
    assert state(A)[5:] == ({"units": "m"},)
    assert root["r"].__getstate__() == (1, A, 140, (2,), (20,), "<i4")
    file = A._file
    assert state(file) == (1, 0, file.root, file.truncation, file.journal)
    assert state(file.truncation) == (1, 0)
    file.journal.add("a-job")
    assert state(file.journal) == (1, ("a-job",))
    data = struct.pack("<i", 7) + struct.pack(">dd", 1, 2)
    version, table, references = state(file.root)
    assert version == 2
    assert table[:25] == struct.pack("<QIIBQ", 0, 1, 0, 0, xxhash.xxh3_64_intdigest(data))
    columns = struct.pack("<IIIQ", 140, 20, 0, 0) + struct.pack("<QB", 20, 0)  # (of one row all planes are in order)
    assert zlib.decompress(table[25:]) == columns
    (segment,) = references
    assert type(segment) is InlineSegment
    assert state(segment) == (1, data)


def test_the_tree(connection):
    connection.root()["A"] = A = dz.ZBigArray(1 << 40, "u1")
    position = (5 << 36) + 3 * LEAF + 9
    A[position] = 1
    connection.transaction_manager.commit()
    version, depth, root, _, _ = state(A._file)
    assert (version, depth) == (1, 2)
    version, level, keys, children = state(root)
    assert (version, level) == (1, 2)
    assert keys == struct.pack("<2H", 0, 5)  # the first leaves are made ahead
    version, level, keys, children = state(children[1])
    assert (version, level, keys) == (1, 1, struct.pack("<H", 3))
    assert unpacked(state(children[0])[1], 1) == ([(position, position + 1, 0, 0)], [1])


def test_joined_segments(connection):
    connection.root()["A"] = A = dz.ZBigArray(1 << 20, "u1")
    connection.transaction_manager.commit()
    was = []
    for k in range(16):
        A[k * 100 : k * 100 + 10] = k + 1
        connection.transaction_manager.commit()
        leaf = A._file.root
        was.append(leaf.refs[-1].obj._p_oid)
    # The twelfth has joined all before it and itself; four came after it.
    version, table, (joined, *rest) = state(leaf)
    n, k, age = struct.unpack_from("<IIB", table, 8)
    assert (version, n, k, age, len(rest)) == (2, 16, 12, 4, 4)
    assert table[17:25] == joined._p_oid
    moved = leaf.move.rows.tolist()
    assert [row[:2] for row in moved] == [(k * 100, k * 100 + 10) for k in range(12)]
    assert [row[2].ljust(8, b"\0") for row in moved][:11] == was[:11]
    assert [row[3] for row in moved] == [0] * 12
    rows, lengths = unpacked(table, 5)
    assert [row[:2] for row in rows] == [(k * 100, k * 100 + 10) for k in range(16)]
    assert lengths == [120, 10, 10, 10, 10]
    assert np.array_equal(A[:1600:100], np.arange(1, 17))


def test_staging():
    job = staging.StagingJob(30.0)
    assert job.__getstate__() == (1, False, job.lease, job.slots)
    assert job.lease.__getstate__() == (1, 30.0, job.lease.until)
    slot = staging.StagingSlot()
    assert slot.__getstate__() == (1, slot.entries)
    assert staging.ROOT_KEY == "dask_zbig.staging"
