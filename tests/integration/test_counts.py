"""What speed is made of, counted: faults, fills, objects, bytes, mappings, round trips.

Noise cannot touch these. The bounds are what there is today, and a little: more is a regression, to be explained.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import transaction
from ZEO.asyncio.client import Protocol

import dask_zbig as dz
from dask_zbig.memory._native import counters
from dask_zbig.openfile import OpenFile
from dask_zbig.storage.reader import SegmentReader

from tests.scratch import in_use  # isort: skip

MIB = 1 << 20
ROW = np.arange(128.0)  # 1 KiB


@contextlib.contextmanager
def connected(where):
    """A connection to a database opened for it: nothing of it is in any cache."""
    db = dz.open(where)
    manager = transaction.TransactionManager()
    connection = db.open(transaction_manager=manager)
    try:
        yield connection, connection.root(), manager
    finally:
        manager.abort()
        connection.close()
        db.close()


@contextlib.contextmanager
def counting():
    """How much the core's counters grow while the block runs."""
    before, grown = counters(), Counter()
    yield grown
    grown.update({key: number - before[key] for key, number in counters().items()})


def mappings():
    with open("/proc/self/maps", "rb") as maps:
        return sum(1 for _ in maps)


def wrote():
    with open("/proc/self/io") as io:
        return next(int(line.split()[1]) for line in io if line.startswith("wchar"))


# -- scratch files


# guard: OpenFile._resume; removed -> a file for each commit
def test_small_commits_go_on_in_one_scratch_file(tmp_path):
    files, names = 0, set()
    with connected(tmp_path / "x.fs") as (connection, root, manager):
        root["A"] = array = dz.ZBigArray(64 * MIB, "u1")
        manager.commit()
        directory = connection._normal_storage.temporaryDirectory()
        view = array[:]
        for n in range(50):
            view[n * MIB] = n
            now = {name for name in os.listdir(directory) if name.startswith("zbig")}
            files, names = max(files, len(now)), names | now
            manager.commit()
        assert view[: 50 * MIB : MIB].tolist() == list(range(50))
        assert in_use() & names
    assert (files, len(names)) == (1, 2)  # of 32 blocks each
    assert not [name for name in os.listdir(directory) if name.startswith("zbig")]


# -- syncs


# guard: Target.durable and zb_space_transient; without them the client's copy goes to the disk as well
@pytest.mark.parametrize("where", ["file", "shared", "cache"])
def test_only_who_keeps_the_data_has_the_disk_write_it(tmp_path, monkeypatch, where):
    synced = Counter()

    def sync(fd, fsync=os.fsync):
        synced[os.path.realpath(f"/proc/self/fd/{fd}")] += 1
        fsync(fd)

    with contextlib.ExitStack() as stack:
        path = str(tmp_path / "x.fs")
        uri = path if where == "file" else stack.enter_context(dz.serve(path, shared_blob_dir=where == "shared"))
        _, root, manager = stack.enter_context(connected(uri))
        root["A"] = array = dz.ZBigArray(8 * MIB, "u1")
        manager.commit()
        monkeypatch.setattr(os, "fsync", sync)
        with counting() as count:
            array[:][:] = 1
            manager.commit()
        assert array.sum() == 8 * MIB
    scratch = [name for name in synced if "zbig-" in name]
    assert (len(scratch), count["writebacks"]) == ((0, 0) if where == "cache" else (1, 3)), synced


# -- faults


def test_a_sequential_writer_takes_at_most_a_fault_a_mib(tmp_path):
    with connected(tmp_path / "x.fs") as (_, root, manager):
        root["A"] = array = dz.ZBigArray(64 * MIB, "u1")
        manager.commit()
        view = array[:]
        for fill in (1, 2):  # on a hole, then on committed data
            with counting() as count:
                for at in range(0, len(view), MIB // 2):
                    view[at : at + MIB // 2] = fill
            assert 32 <= count["write_faults"] <= 64
            manager.commit()
        assert view.min() == view.max() == 2


def test_a_direct_assignment_takes_no_fault(tmp_path):
    with connected(tmp_path / "x.fs") as (_, root, manager):
        root["A"] = array = dz.ZBigArray(32 * MIB, "u1")
        manager.commit()
        with counting() as count:
            array[:] = np.ones(32 * MIB, "u1")
            array.append(np.ones(32 * MIB, "u1"))
            manager.commit()
        assert (count["write_faults"], count["read_faults"], count["bytes_copied"]) == (0, 0, 0)
        assert array[:].min() == 1


def test_reading_what_is_local_takes_no_fault(tmp_path):
    with connected(tmp_path / "x.fs") as (_, root, manager):
        root["A"] = dz.ZBigArray(32 * MIB, "u1")
        root["A"][:] = 7
        root["B"] = dz.ZBigArray(1000, "u1")  # inline
        root["B"][:] = 7
        root["hole"] = dz.ZBigArray(1 << 40, "u1")
        manager.commit()
    with connected(tmp_path / "x.fs") as (_, root, _), counting() as count:
        assert root["A"][:].min() == 7
        assert root["B"][:].min() == 7
        assert root["A"][::4099].max() == 7
        assert root["hole"][:][12345678901] == 0
    assert (count["read_faults"], count["bus_faults"], count["waits"], count["write_faults"]) == (0, 0, 0, 0)


def test_reading_what_is_local_takes_no_fault_over_zeo(tmp_path):
    with dz.serve(tmp_path / "x.fs") as uri:
        with connected(uri) as (_, root, manager):
            root["A"] = dz.ZBigArray(32 * MIB, "u1")
            root["A"][:] = 7
            manager.commit()
        with connected(uri) as (_, root, _), counting() as count:
            assert root["A"][:].min() == 7
        assert (count["read_faults"], count["waits"]) == (0, 0)


def test_what_a_view_needs_is_asked_for_at_once(tmp_path, monkeypatch):
    """The leaves, and then the segments: not each when the one before has come. And each once."""
    leaves = 8
    together, sent = set(), []
    load_before, call_sync = Protocol.load_before, Protocol.call_sync

    def counted(self, oid, tid):
        try:
            return load_before(self, oid, tid)
        finally:
            waiting = {key[0] for key in self.futures if isinstance(key, tuple)}
            if len(waiting) >= leaves:
                together.update(waiting)

    def noted(self, method, args, *more):
        if method == "loadBefore":
            sent.append(args[0])
        return call_sync(self, method, args, *more)

    with dz.serve(tmp_path / "x.fs") as uri:
        with connected(uri) as (_, root, manager):
            root["A"] = A = dz.ZBigArray(leaves * 64 * MIB, "u1")
            for k in range(leaves):
                A[k * 64 * MIB : k * 64 * MIB + MIB] = 7
                manager.commit()
        with connected(uri) as (_, root, manager):
            A = root["A"]
            assert A.shape
            monkeypatch.setattr(Protocol, "load_before", counted)
            monkeypatch.setattr(Protocol, "call_sync", noted)
            view = A[:]
            assert len(together) >= 2 * leaves
            assert max(Counter(sent).values()) == 1
            assert len(sent) <= 2 * leaves + 4
            assert int(view.sum(dtype="i8")) == 7 * leaves * MIB


def test_a_hot_slice_fills_nothing(tmp_path, monkeypatch):
    fills = []
    fill = OpenFile.fill
    monkeypatch.setattr(OpenFile, "fill", lambda *args, **options: fills.append(args) or fill(*args, **options))
    with connected(tmp_path / "x.fs") as (_, root, manager):
        root["A"] = array = dz.ZBigArray((4096, 512), "u1")
        array[:] = 7
        manager.commit()
    with connected(tmp_path / "x.fs") as (_, root, _):
        array = root["A"]
        assert array[:].min() == 7
        assert fills, "the spy must see a cold view"
        fills.clear()
        with counting() as count:
            for i in range(100):
                assert array[i, 5] == array[i][5] == array[i : i + 2][1, 5] == 7
        assert (fills, count["fills"], count["read_faults"]) == ([], 0, 0)


# -- small commits


def commits(connection, path, times, change):
    """Objects and bytes of a commit; calls that a ZEO client waits for."""
    calls = []
    server = getattr(connection.db().storage, "_server", None)
    if server is not None:
        ask = server.io_call
        server.io_call = lambda work, wait=True: (calls.append(work) if wait else None, ask(work, wait))[1]
    loads, stores = connection.getTransferCounts()
    size, written = os.path.getsize(path), wrote()
    for i in range(times):
        change(i)
        connection.transaction_manager.commit()
    after = connection.getTransferCounts()
    return {
        "loads": (after[0] - loads) / times,
        "stores": (after[1] - stores) / times,
        "grown": (os.path.getsize(path) - size) / times,
        "written": (wrote() - written) / times,
        "calls": len(calls) / times,
    }


TIMES = 200


def test_what_a_small_append_costs(tmp_path, monkeypatch):
    path, loaded, load = tmp_path / "x.fs", [], SegmentReader.load_inline
    monkeypatch.setattr(SegmentReader, "load_inline", lambda *args: loaded.append(args) or load(*args))
    with connected(path) as (connection, root, manager):
        root["A"] = array = dz.ZBigArray(0)
        array.append(ROW)
        manager.commit()
        with counting() as count:
            each = commits(connection, path, TIMES, lambda _: array.append(ROW))
        assert loaded == []  # a page is compared with what the commits before have put there, which is remembered
        # the array (its shape), its leaf, the new segment; and every twelfth time what is joined
        assert each["loads"] == 0
        assert each["stores"] <= 3.2
        assert each["grown"] <= 4500
        assert each["written"] <= 15_500  # ZODB writes it to a temporary file first
        assert count["write_faults"] <= TIMES
        assert count["read_faults"] == 0
        assert np.array_equal(array[:].reshape(-1, 128), np.tile(ROW, (TIMES + 1, 1)))


def test_what_a_small_update_costs(tmp_path):
    path = tmp_path / "x.fs"
    with connected(path) as (connection, root, manager):
        root["A"] = array = dz.ZBigArray(64 * MIB, "u1")
        array[:] = 7
        manager.commit()
        view, where = array[:], np.random.default_rng(1).choice(len(array) // 8, TIMES, replace=False) * 8

        def change(i):
            view[where[i] : where[i] + 8] = i

        with counting() as count:
            each = commits(connection, path, TIMES, change)
        assert each["loads"] == 0
        assert each["stores"] <= 2.2  # the leaf, the new segment
        assert each["grown"] <= 7000
        assert each["written"] <= 24_000
        assert count["write_faults"] <= TIMES
        assert count["read_faults"] == 0
        assert [view[at] for at in where] == [i % 256 for i in range(TIMES)]


def test_what_a_small_append_costs_over_zeo(tmp_path):
    path = tmp_path / "x.fs"
    with dz.serve(path) as uri, connected(uri) as (connection, root, manager):
        root["A"] = array = dz.ZBigArray(0)
        array.append(ROW)
        manager.commit()
        each = commits(connection, path, TIMES, lambda _: array.append(ROW))
        assert 2 <= each["calls"] <= 2.1  # vote and finish: what a commit of ZODB's own costs
        assert each["loads"] == 0
        assert each["stores"] <= 3.2
        assert each["grown"] <= 4500


# -- mappings


def fragmented(path, pages):
    """An array every other page of which a later transaction has overwritten; how many extents that made."""
    with connected(path) as (_, root, manager):
        root["A"] = array = dz.ZBigArray((pages, 4096), "u1")
        array[:] = 1
        manager.commit()
        view = array[:]
        for at in range(0, pages, 4000):
            view[at : at + 4000 : 2] = 2
            manager.commit()
        return sum(len(leaf.extents) for _, leaf in array._file.leaves(0, view.nbytes))


def check_fragmented(path, pages, most):
    assert fragmented(path, pages) >= pages
    with connected(path) as (_, root, _), counting() as count:
        before = mappings()
        view = root["A"][:]
        assert int(view.sum(dtype="u8")) == pages * 4096 * 3 // 2
        assert mappings() - before <= most
    assert count["read_faults"] <= pages * 4096 / MIB


def test_many_extents_take_few_mappings(tmp_path):
    check_fragmented(tmp_path / "x.fs", 4000, 400)


@pytest.mark.slow
def test_100_000_extents_stay_below_the_limit_of_mappings(tmp_path):
    check_fragmented(tmp_path / "x.fs", 100_000, 30_000)


@pytest.mark.parametrize("size", [1 << 30, 1 << 40])
def test_a_hole_is_a_mapping_or_two(tmp_path, size):
    with connected(tmp_path / "x.fs") as (_, root, manager):
        root["A"] = array = dz.ZBigArray(size, "u1")
        manager.commit()
        array[:1]
        before = mappings()
        view = array[:]
        assert view[size // 2] == 0
        assert mappings() - before <= 4


# -- import


def test_import_leaves_the_cluster_out(tmp_path):
    """What costs most to import comes when it is used."""
    code = "import sys, dask_zbig; print(*({'distributed', 'dask.array', 'ZEO', 'pandas'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == []
