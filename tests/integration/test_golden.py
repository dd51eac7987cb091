"""The format is a promise: databases made by older versions open, are sound, read and can be written to, for ever."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import transaction
from persistent.mapping import PersistentMapping
from ZODB.FileStorage import FileIterator

import dask_zbig as dz
from dask_zbig.cluster.staging import ROOT_KEY
from dask_zbig.storage.records import read_record
from dask_zbig.storage.segment import InlineSegment
from tests.golden import values

GOLDEN = os.path.dirname(values.__file__)
FORTRAN = {"f"}


@pytest.fixture(params=["v1", "v2"])
def version(request):
    return request.param


@pytest.fixture
def path(tmp_path, version):
    path, golden = str(tmp_path / f"{version}.zodb"), os.path.join(GOLDEN, f"{version}.zodb")
    shutil.copy(golden, path)
    shutil.copy(golden + ".oid", path + ".oid")
    shutil.copytree(golden + ".blobs", path + ".blobs")
    return path


def find(root, name):
    return root["group"][name] if name == "scalar" else root[name]


def check_all(root, changed=()):
    """Everything that was stored, but the arrays that were `changed`."""
    for name, expected in values.values().items():
        if name in changed:
            continue
        A = find(root, name)
        assert isinstance(A, dz.ZBigArray)
        assert (A.shape, A.dtype, A.order) == (expected.shape, expected.dtype, "F" if name in FORTRAN else "C"), name
        got = A[...]
        assert got.flags.f_contiguous if name in FORTRAN else got.flags.c_contiguous
        np.testing.assert_array_equal(got, expected, err_msg=name)
    c = values.values()["c"]
    assert (root["c"].units, root["c"].notes) == ("m/s", {"by": ["a", 1]})
    assert isinstance(root["group"], PersistentMapping)
    if "c" not in changed:
        np.testing.assert_array_equal(root["group"]["corner"].deref(), c[3, 1::2])
    assert values.JOB in root["c"]._file.journal.jobs
    tera = root["tera"]
    assert tera.shape == (1 << 50 if changed else values.TERABYTE,)
    for position, value in values.TERA.items():
        lo, hi = max(0, position - 2), position + 3
        near = {p - lo: v for p, v in values.TERA.items() if lo <= p < hi}
        assert {int(p): int(tera[lo:hi][p]) for p in np.flatnonzero(tera[lo:hi])} == near
        assert tera[position] == value


def layout(array):
    """Of its first leaf: the kinds of segments, the number of extents, and of moved runs."""
    ((_, leaf),) = array._file.leaves(0, 1)
    return {type(r.obj).__name__ for r in leaf.refs}, leaf.extents, len(leaf.move.rows)


def leaf_versions(path):
    """Of the leaves that are stored."""
    found = set()
    for transaction_ in FileIterator(path):
        for record in transaction_:
            kind, state = read_record(record.oid, record.data)
            if kind == "dask_zbig.storage.tree.ExtentLeaf":
                found.add(state[0])
    return found


def test_it_has_what_it_is_to_have(path, version):
    """Or the other tests would say nothing."""
    assert leaf_versions(path) == {int(version[1:])}
    db = dz.open(path)
    with db.transaction() as connection:
        root = connection.root()
        kinds, extents, _ = layout(root["blob"])
        assert kinds == {"Blob"}
        assert extents["start"].tolist() == [0, 22_000]  # a hole between
        assert extents["stop"].tolist() == [10_000, 30_000]
        assert layout(root["c"])[0] == {"InlineSegment"}
        kinds, extents, moved = layout(root["joined"])
        assert kinds == {"InlineSegment"}
        assert len(extents) < 16
        assert moved > 1
        kinds, extents, moved = layout(root["joined-blob"])
        assert kinds == ({"Blob"} if version == "v1" else {"Blob", "InlineSegment"})
        assert (len(extents), moved > 1) == (1 if version == "v1" else 5, True)
        assert root["tera"]._file.depth == 2
        assert root["shrunk"]._file.truncation.count >= 1
        assert root["c"].dtype.isnative
        assert not root["big-endian"].dtype.isnative
        ((_, job),) = root[ROOT_KEY].items()
        ((segments, size),) = [e for slot in job.slots.values() for e in slot.entries.values()]
        assert isinstance(segments[0], InlineSegment)
        assert segments[0].data == b"staged, and never published"
        assert (size, job.ended, job.lease.until > job.lease.seconds > 0) == (27, False, True)
    db.close()


def test_read_and_check(path):
    report = dz.check(path)
    assert report.sound, report
    assert report.arrays == len(values.values()) + 1
    db = dz.open(path)
    with db.transaction() as connection:
        check_all(connection.root())
    db.close()


def change_all(connection):
    """Each in some way: an element, an append, a resize."""
    root = connection.root()
    root["c"][0, 0] = 5
    root["f"].append(np.full((7, 11, 2), 3, "<i4"))
    root["blob"][1, :3000] = 9
    root["joined"].append(np.arange(3, dtype="u1"))
    root["joined-blob"][3] = 1
    root["records"][2]["x"][1] = 2.5
    root["times"].resize(5)
    root["shrunk"].resize(10)
    root["shrunk"].resize(20)
    root["empty"].append(np.ones((2, 3), "<f4"))
    root["tera"][1 << 39] = 8
    root["tera"].resize(1 << 50)
    root["group"]["scalar"][...] = 43
    root["new"] = dz.ArrayRef(root["truth"][3:])


CHANGED = {"c", "f", "blob", "joined", "joined-blob", "records", "times", "shrunk", "empty", "scalar"}


def check_changed(root):
    check_all(root, CHANGED)
    was = values.values()
    was["c"][0, 0] = 5
    was["f"] = np.concatenate([was["f"], np.full((7, 11, 2), 3, "<i4")], axis=2)
    was["blob"][1, :3000] = 9
    was["joined"] = np.concatenate([was["joined"], np.arange(3, dtype="u1")])
    was["joined-blob"][3] = 1
    was["records"]["x"][2, 1] = 2.5
    was["times"] = was["times"][:5]
    was["shrunk"] = np.concatenate([was["shrunk"][:10], np.zeros(10, "<i2")])
    was["empty"] = np.ones((2, 3), "<f4")
    was["scalar"] = np.array(43, "<i4")
    for name in CHANGED:
        np.testing.assert_array_equal(find(root, name)[...], was[name], err_msg=name)
    assert root["tera"][1 << 39] == 8
    np.testing.assert_array_equal(root["new"].deref(), was["truth"][3:])


def test_write_pack_and_read_again(path):
    db = dz.open(path)
    connection = db.open(transaction.TransactionManager())
    change_all(connection)
    connection.transaction_manager.commit()
    check_changed(connection.root())
    connection.close()
    db.pack()
    db.close()
    assert dz.check(path).sound
    db = dz.open(path)
    with db.transaction() as connection:
        check_changed(connection.root())
    assert dz.check(db).sound
    db.close()


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False])
def test_through_a_server(path, shared):
    with dz.serve(path, shared_blob_dir=shared) as uri:
        db = dz.open(uri)
        with db.transaction() as connection:
            check_all(connection.root())
        connection = db.open(transaction.TransactionManager())
        change_all(connection)
        connection.transaction_manager.commit()
        connection.close()
        db.close()
        db = dz.open(uri)
        with db.transaction() as connection:
            check_changed(connection.root())
        assert dz.check(db).sound
        db.close()


def test_it_is_left_as_it_is():
    """Git has everything that is needed, and nothing else."""
    names = sorted(os.listdir(GOLDEN))
    for version in ("v1", "v2"):
        assert [n for n in names if n.startswith(version)] == [f"{version}.zodb{x}" for x in ("", ".blobs", ".oid")]
        with open(os.path.join(GOLDEN, f"{version}.zodb.blobs/.layout")) as file:
            assert file.read() == "bushy"
