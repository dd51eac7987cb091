"""Small transactions: 1 KiB appended, 8 bytes changed; against ZODB itself, one 1 KiB object a commit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import transaction
from persistent import Persistent

import dask_zbig as dz
from benchmarks.bulk import new_array
from benchmarks.measure import median_of, opened, served, written
from benchmarks.model import Place, side
from dask_zbig.memory._native import counters

ROW = np.arange(128.0)  # 1 KiB
COMMITS = 1000
MANY = 10_000


class Kilobyte(Persistent):  # type: ignore[misc]
    """What raw ZODB stores."""

    data = b""


def _commits(connection: Any, path: str, times: int, change: Callable[[int], object]) -> dict[str, Any]:
    """Seconds, growth of the data file and what was done for it, each of so many commits."""
    change(0)
    transaction.commit()
    calls = _count_calls(connection)
    size, wrote, transfers = os.path.getsize(path), written(), connection.getTransferCounts()
    before = counters()
    start = time.perf_counter()
    for i in range(1, times + 1):
        change(i)
        transaction.commit()
    seconds = (time.perf_counter() - start) / times
    after, loads = counters(), connection.getTransferCounts()
    return {
        "seconds": seconds,
        "grown": (os.path.getsize(path) - size) / times,
        "written": (written() - wrote) / times,
        "loads": (loads[0] - transfers[0]) / times,
        "stores": (loads[1] - transfers[1]) / times,
        "write_faults": (after["write_faults"] - before["write_faults"]) / times,
        "fills": (after["fills"] - before["fills"]) / times,
        "round_trips": len(calls) / times,
    }


def _count_calls(connection: Any) -> list[Any]:
    """What a ZEO client asks its server and waits for, from now on; stays empty with other storages."""
    calls: list[Any] = []
    server = getattr(connection.db().storage, "_server", None)
    if server is not None:
        ask = server.io_call

        def counted(work: Any, wait: bool = True) -> Any:
            if wait:
                calls.append(work)
            return ask(work, wait)

        server.io_call = counted
    return calls


def _raw(connection: Any, path: str, times: int) -> dict[str, Any]:
    connection.root()["o"] = thing = Kilobyte()
    transaction.commit()

    def change(i: int) -> None:
        thing.data = i.to_bytes(8, "big") * 128

    return _commits(connection, path, times, change)


def _append(connection: Any, path: str, times: int) -> dict[str, Any]:
    array = new_array(connection, 0)
    result = _commits(connection, path, times, lambda _: array.append(ROW))
    assert np.array_equal(array[:].reshape(-1, len(ROW)), np.tile(ROW, (times + 1, 1)))
    return result


def _update(connection: Any, path: str, times: int) -> dict[str, Any]:
    """Change elements at random of the array that was written, which is left as it was."""
    array = connection.root()["A"]
    where = np.random.default_rng(2).choice(len(array), times + 1, replace=False).tolist()
    old = [float(array[at]) for at in where]
    view = array[:]

    def change(i: int) -> None:
        view[where[i]] = -1

    result = _commits(connection, path, times, change)
    transaction.begin()
    assert all(array[at] == -1 for at in where)
    view[where] = old
    transaction.commit()
    return result


@side("commit.zodb")
def commit_zodb(place: Place) -> dict[str, Any]:
    """ZODB: one object of 1 KiB changed a commit, on the FileStorage that dz.open makes; fsync of Data.fs in each."""
    with opened(place.path("raw.fs")) as connection:
        return _raw(connection, place.path("raw.fs"), place.times(COMMITS))


@side("append.memmap", needs=["write.memmap"])
def append_memmap(place: Place) -> dict[str, Any]:
    """np.memmap: 1 KiB written at the next place of a file that has the room, flush (msync). Not atomic."""
    array, times = np.memmap(place.path("append.memmap"), "f8", "w+", shape=(1 << 21,)), place.times(COMMITS)
    start = time.perf_counter()
    for i in range(times):
        array[i * 128 : (i + 1) * 128] = ROW
        array.flush()
    return {"seconds": (time.perf_counter() - start) / times}


@side("append.view")
def append_view(place: Place) -> dict[str, Any]:
    """dask_zbig: append 1 KiB and commit; fsync of Data.fs in each."""
    with opened(place.path("append.fs")) as connection:
        return _append(connection, place.path("append.fs"), place.times(COMMITS))


@side("append.zodb-zeo")
def append_zodb_zeo(place: Place) -> dict[str, Any]:
    """ZODB over ZEO: as commit.zodb; fsync by the server."""
    with served(place.path("raw-zeo.fs")) as uri, opened(uri) as connection:
        return _raw(connection, place.path("raw-zeo.fs"), place.times(COMMITS))


@side("append.zeo")
def append_zeo(place: Place) -> dict[str, Any]:
    """dask_zbig over ZEO: append 1 KiB and commit; fsync by the server."""
    with served(place.path("append-zeo.fs")) as uri, opened(uri) as connection:
        return _append(connection, place.path("append-zeo.fs"), place.times(COMMITS))


@side("append.many", once=True)
def append_many(place: Place) -> dict[str, Any]:
    """dask_zbig: 10,000 appends of 1 KiB, each committed; and the same array written at once."""
    with opened(place.path("bulk.fs")) as connection:
        new_array(connection, 0).append(np.tile(ROW, place.times(MANY) + 1))
        transaction.commit()
    with opened(place.path("many.fs")) as connection:
        return _append(connection, place.path("many.fs"), place.times(MANY))


@side("append.readback", needs=["append.many"], once=True)
def append_readback(place: Place) -> dict[str, Any]:
    """dask_zbig: view and sum what 10,000 appends have left, and the same written at once; database and cache fresh."""
    expected = float(ROW.sum()) * (place.times(MANY) + 1)

    def read(name: str) -> float:
        db = dz.open(place.path(name))
        connection = db.open()
        array = connection.root()["A"]
        len(array)
        start = time.perf_counter()
        total = float(array[:].sum())
        seconds = time.perf_counter() - start
        assert total == expected
        connection.close()
        db.close()
        return seconds

    read("bulk.fs")
    return {"many": median_of(7, lambda: read("many.fs")), "bulk": median_of(7, lambda: read("bulk.fs"))}


@side("update.view", needs=["write.view"])
def update_view(place: Place) -> dict[str, Any]:
    """dask_zbig: change 8 bytes at random, through a view, and commit; fsync of Data.fs in each."""
    with opened(place.path("x.fs")) as connection:
        return _update(connection, place.path("x.fs"), place.times(COMMITS))


@side("update.zeo", needs=["write.view"])
def update_zeo(place: Place) -> dict[str, Any]:
    """dask_zbig over ZEO: as update.view; fsync by the server."""
    with served(place.path("x.fs")) as uri, opened(uri) as connection:
        return _update(connection, place.path("x.fs"), place.times(COMMITS))
