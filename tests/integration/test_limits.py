"""What there is only so much of: descriptors, and the patience of whoever waits for a loader."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tracemalloc

import dask
import numpy as np
import pytest
from ZODB.POSException import ConflictError

import dask_zbig as dz
from dask_zbig.memory._native import BLOCK, counters

SECONDS = 300


def run(program, *arguments, **environment):
    """Run a program in a Python of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# -- descriptors

FEW = """
    import os, resource, sys, transaction
    import numpy as np
    import dask_zbig as dz

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    BLOCK, TIMES = 10 << 20, 1500  # apart, so that a leaf has too few segments for them to be joined
    path, large = sys.argv[1], int(sys.argv[2])

    def opened():
        connection = dz.open(path).open()
        return connection, connection.root()

    def change(view, k):
        # at the start of a block, so that its scratch file is worth keeping whole; or a bit of it only
        view[k * BLOCK : k * BLOCK + (large if k % 4 else 100)] = 1 + k % 250

    def check(view, upto):
        for k in range(1, TIMES):
            row = view[k * BLOCK : k * BLOCK + large + 1]
            size = (large if k % 4 else 100) if k < upto else 0
            assert (row[:size] == 1 + k % 250).all() and not row[size:].any(), (k, upto)
"""

SAVEPOINTS = (
    FEW
    + """
    connection, root = opened()
    root["A"] = A = dz.ZBigArray(TIMES * BLOCK, "u1")
    transaction.commit()
    view = A[:]
    points = []
    for k in range(1, TIMES):
        change(view, k)
        points.append(transaction.savepoint())
    check(view, TIMES)
    for upto in (1400, 900, 700):
        points[upto - 2].rollback()
        check(view, upto)
    for k in range(700, TIMES):
        change(view, k)
        transaction.savepoint()
    transaction.commit()
    check(view, TIMES)
    for most in (1, 0):  # one may be there to be gone on with
        left = [n for n in os.listdir(os.path.join(path + ".blobs", "tmp")) if n.startswith("zbig")]
        assert len(left) <= most, left[:3]
        connection.close()
    connection.db().close()
"""
)

SEGMENTS = (
    FEW
    + """
    connection, root = opened()
    A = root["A"]
    A.prefetch()
    blobs = {ref.key for _, leaf in A._file.leaves(0, A.nbytes) for ref in leaf.refs if not ref.inline}
    assert len(blobs) > int(sys.argv[3]), len(blobs)
    check(A[:], TIMES)
"""
)


@pytest.mark.parametrize(("large", "blobs"), [(128 << 10, 1000), (4096, 0)], ids=["whole", "packed"])
def test_many_savepoints_and_segments_with_few_descriptors(tmp_path, large, blobs):
    path = tmp_path / "x.fs"
    run(SAVEPOINTS, path, large)
    run(SEGMENTS, path, large, blobs)


# -- elements that lie in two pages

PAIR = np.dtype([("a", "<i4"), ("b", "<i8")])  # 12 bytes: element 341 lies in bytes 4092..4104
TORN = 341


def change(client, array, element, field, value):
    array[element : element + 1][field] = value
    client.commit()


@pytest.mark.parametrize("size", [1000, (64 << 20) // 12 * 2], ids=["one leaf", "two leaves"])
@pytest.mark.parametrize("inline", ["64 KiB", "0"])
def test_two_fields_of_one_element_conflict_though_they_lie_in_two_pages(merging, size, inline):
    merging.new(size, PAIR)
    torn = TORN if size == 1000 else (64 << 20) // 12  # the one that lies in two pages, or leaves
    with dask.config.set({"zbig.inline-limit": inline}):
        one, first, two, second = merging.pair()
        first[torn], second[torn]  # (both have their snapshots)
        change(one, first, torn, "a", 1)
        with pytest.raises(ConflictError):
            change(two, second, torn, "b", 2)
        two.abort()
        two.begin()
        assert second[torn].tolist() == (1, 0)
        change(two, second, torn, "b", 2)
        one.begin()
        assert first[torn].tolist() == (1, 2)


@pytest.mark.parametrize("inline", ["64 KiB", "0"])
def test_different_elements_merge_though_they_share_pages(merging, inline):
    merging.new(1000, PAIR)
    with dask.config.set({"zbig.inline-limit": inline}):
        one, first, two, second = merging.pair()
        first[0], second[0]
        change(one, first, TORN, "a", 1)
        second[TORN - 1 : TORN + 2 : 2]["a"] = 2
        second[TORN - 1 : TORN + 2 : 2]["b"] = 3
        two.commit()
        one.begin()
        assert first[TORN - 2 : TORN + 3].tolist() == [(0, 0), (2, 3), (1, 0), (2, 3), (0, 0)]


def test_an_element_that_is_claimed_as_a_whole_keeps_its_bytes(clients):
    """Those that its transaction did not write: committed ones, and its own of before a savepoint."""
    clients.new(1000, PAIR)
    client = clients.connect()
    array = client.root["A"]
    array[:]["a"] = np.arange(1000)
    array[:]["b"] = -np.arange(1000)
    client.commit()
    array[TORN : TORN + 1]["b"] = 7
    client.savepoint()
    array[TORN : TORN + 1]["a"] = 8
    client.commit()
    other = clients.connect(other=True)
    other.begin()
    got = other.root["A"][:]
    want = np.zeros(1000, PAIR)
    want["a"], want["b"] = np.arange(1000), -np.arange(1000)
    want[TORN] = (8, 7)
    np.testing.assert_array_equal(got, want)


def test_interleaved_changes_merge_though_they_are_very_many(merging):
    merging.new(20_000)
    one, first, two, second = merging.pair()
    mine, theirs = first[:8192], second[:8192]
    mine[::2] = 1
    theirs[1::2] = 2
    one.commit()
    two.commit()
    one.begin()
    assert (first[:8192:2] == 1).all()
    assert (first[1:8192:2] == 2).all()
    assert not first[8192:].any()


# -- loaders


# guard: mapping.py `COMPOSED`; without it -> 130 MiB
def test_a_fragmented_view_takes_little_memory(local):
    """Its pages are copied together a few at a time, however many follow each other."""
    pages = 16_000
    local.new((pages, 512), "f8")
    one = local.connect()
    A = one.root["A"]
    A[:] = 1
    one.commit()
    A[::2] = 2
    one.commit()
    other = local.connect()
    view = other.root["A"]
    len(view)
    tracemalloc.start()
    try:
        view.prefetch()
        assert float(view[:].sum()) == pages * 768
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30 << 20


# guard: mapping.py `_affordable`; without it -> all is copied when it is viewed
def test_a_view_of_very_many_pieces_copies_them_when_they_are_touched(local, monkeypatch):
    monkeypatch.setattr("dask_zbig.mapping.EAGER", 4 * BLOCK)
    blocks = 16
    local.new((blocks * 512, 512), "f8")
    one = local.connect()
    A = one.root["A"]
    A[:] = np.arange(blocks * 512)[:, None]
    one.commit()
    A[: blocks * 256 : 2] = -1  # of the first half every other page; the second half is in one piece
    one.commit()
    expected = A[:].copy()
    other = local.connect()
    view = other.root["A"][:]

    def loaded():
        """Read all; how many blocks were mapped by that?"""
        before = counters()["read_faults"]
        np.testing.assert_array_equal(view, expected)
        return counters()["read_faults"] - before

    assert not other.root["A"]._open().lacks(0, 4 * BLOCK)
    assert other.root["A"]._open().lacks(4 * BLOCK, 8 * BLOCK)
    assert 1 <= loaded() <= 12
    assert loaded() == 0
    for turn in range(2):  # each transaction may copy as much again
        other.root["A"]._open().space.drop(0, view.nbytes)
        other.abort()
        view = other.root["A"][:]
        assert other.root["A"]._open().lacks(4 * BLOCK, 8 * BLOCK)
        if turn:
            other.root["A"].prefetch()
            assert loaded() == 0


def test_an_option_that_makes_no_sense_does_not_stop_the_loaders(local):
    local.new(10, "u1")
    client = local.connect()
    client.root["A"][:] = 3
    client.commit()
    view = client.root["A"][:]
    space = client.root["A"]._open().space
    for _ in range(10):  # there are fewer loaders
        space.drop(0, 10)
        with dask.config.set({"zbig.load-timeout": "soon"}), pytest.raises(dz.OptionError, match="load-timeout"):
            touch(view)
        client.abort()
    assert view.tolist() == [3] * 10


def touch(view):
    assert view[0] == 255
    for _ in range(10**7):  # an asynchronous exception is delivered at the next turn
        pass


# -- finalizers that touch views, run by the collector wherever it runs

FINALIZERS = """
    import gc, os, sys, threading, time, transaction
    import numpy as np
    import dask_zbig as dz
    from dask_zbig.basemap import BaseMap
    from dask_zbig.openfile import OpenFile

    BLOCK, BLOCKS = 2 << 20, 40
    gc.disable()  # but for where the test collects
    db = dz.open(sys.argv[1])
    root = db.open().root()
    for name in "AB":
        root[name] = dz.ZBigArray(BLOCKS * BLOCK, "u1")
        root[name][:] = np.repeat(np.arange(1, BLOCKS + 1), BLOCK)
    transaction.commit()
    db.close()
    db = dz.open(sys.argv[1])
    root = db.open().root()

    def absent(name):
        array = root[name]
        view = array[:]
        opened = array._open()
        opened.space.drop(0, BLOCKS * BLOCK)
        return opened, view

    class Garbage:
        def __init__(self, view, block):
            self.view, self.block, self.me = view, block, self

        def __del__(self):
            seen.append((threading.current_thread().name, int(self.view[self.block * BLOCK + 5])))

    seen = []

    def collecting(cls, name, place):
        # Have the collector run once in a thread of this name, when it is in that method of ours.
        old = getattr(cls, name)

        def method(self, *args, **kwargs):
            if threading.current_thread().name.startswith(place) and not collected:
                collected.append(1)
                gc.collect()
            return old(self, *args, **kwargs)

        collected = []
        setattr(cls, name, method)

    def all_is_right(name):
        return all((root[name][k * BLOCK : (k + 1) * BLOCK] == k + 1).all() for k in range(BLOCKS))
"""

IN_A_LOADER = (
    FINALIZERS
    + """
    (a, view), (b, other) = absent("A"), absent("B")
    Garbage(other, 7)
    collecting(OpenFile, "serve", "zbig-loader")
    assert view[3 * BLOCK] == 4
    assert len(seen) == 1 and seen[0][0].startswith("zbig-loader") and seen[0][1] == 8, seen
    assert all_is_right("A") and all_is_right("B")
    view[0] = 9
    transaction.commit()
"""
)

UNDER_A_LOCK = (
    FINALIZERS
    + """
    a, view = absent("A")
    Garbage(view, 7)
    where = sys.argv[2]
    collecting(BaseMap, "extents", where)  # which is called with a lock held that every fill takes
    if where == "MainThread":
        try:
            a.content(0, BLOCK)
            for _ in range(10**8):
                pass
            raise AssertionError("not told")
        except dz.LoadError as error:
            assert "finalizer" in str(error), error
        assert view[7 * BLOCK + 5] == 8  # (0xFF was for the finalizer only)
    else:
        assert view[3 * BLOCK] == 4
    assert len(seen) == 1 and seen[0][0].startswith(where) and seen[0][1] == 255, seen
    view[0] = 9
    try:
        transaction.commit()
        raise AssertionError("committed")
    except dz.LoadError as error:
        assert "finalizer" in str(error), error
    transaction.abort()
    assert all_is_right("A")
    view[0] = 9
    transaction.commit()
    assert view[0] == 9
"""
)

AT_ANY_MOMENT = (
    FINALIZERS
    + """
    wrong = []

    class Garbage(Garbage):
        def __del__(self):
            value = self.view[self.block * BLOCK + 5]
            if value != self.block + 1:
                wrong.append(value)
            seen.append(threading.current_thread().name[:4])

    a, view = absent("A")
    gc.set_threshold(1)
    gc.enable()
    enough = time.monotonic() + 40  # where each collection takes long

    def read(seed):
        random = np.random.default_rng(seed)
        for k in range(150):
            if time.monotonic() > enough and len(seen) >= 50:
                break
            n, m = random.integers(BLOCKS, size=2).tolist()
            try:
                Garbage(view, m)
                value = view[n * BLOCK]
                if value != n + 1:
                    wrong.append(value)
                a.space.drop(m * BLOCK, m * BLOCK + 1)
            except dz.LoadError:
                pass

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.set_threshold(700)
    gc.collect()
    assert len(seen) >= 50 and set(map(int, wrong)) <= {255}, (len(seen), wrong)
    transaction.abort()
    assert all_is_right("A")
"""
)


def test_a_finalizer_in_a_loader_is_served_by_another(tmp_path):
    run(IN_A_LOADER, tmp_path / "x.fs", DASK_ZBIG__LOAD_TIMEOUT="60 s")


# guard: loader.py, `_run`: EDEADLK drops what is shown; else view[7 * BLOCK + 5] was 255 until the abort
@pytest.mark.parametrize("where", ["zbig-loader", "MainThread"])
def test_a_finalizer_that_runs_where_loaders_are_locked_out(tmp_path, where):
    run(UNDER_A_LOCK, tmp_path / "x.fs", where, DASK_ZBIG__LOAD_TIMEOUT="1 s")


def test_finalizers_at_any_moment(tmp_path):
    run(AT_ANY_MOMENT, tmp_path / "x.fs", DASK_ZBIG__LOAD_TIMEOUT="1 s")
