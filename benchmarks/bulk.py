"""Large arrays: writing them, reading them, looking at single elements."""

from __future__ import annotations

import glob
import os
import time
from typing import Any

import numpy as np
import transaction

import dask_zbig as dz
from benchmarks.measure import check, discard, fill, mappings, opened, per_call, reread, served, source
from benchmarks.model import Place, side
from dask_zbig.memory._native import counters

PIECE = 2 << 20
READS = 2000
ELEMENTS = np.random.default_rng(1).random(READS)  # where they are, as parts of the array


def new_array(connection: Any, shape: Any, dtype: str = "f8") -> Any:
    """A stored array."""
    connection.root()["A"] = array = dz.ZBigArray(shape, dtype)
    transaction.commit()
    return array


# -- write


@side("write.memmap")
def write_memmap(place: Place) -> dict[str, Any]:
    """np.memmap: fill a new file through the mapping; flush (msync, which waits for the disk) every 64 MiB."""
    array = np.memmap(place.path("memmap"), "f8", "w+", shape=(place.mib << 17,))
    return fill(place.mib, lambda at, data: array.__setitem__(slice(at, at + len(data)), data), array.flush)


@side("write.plain")
def write_plain(place: Place) -> dict[str, Any]:
    """write(2) in pieces of 2 MiB; fsync every 64 MiB."""
    with open(place.path("plain"), "wb", buffering=0) as file:

        def put(_: int, data: np.ndarray) -> None:
            raw = data.data.cast("B")
            for at in range(0, len(raw), PIECE):
                file.write(raw[at : at + PIECE])

        result = fill(place.mib, put, lambda: os.fsync(file.fileno()))
    os.unlink(place.path("plain"))
    return result


def _view(array: Any, mib: int, copies: int = 1) -> dict[str, Any]:
    view = array[:]
    before = counters()

    def put(at: int, data: np.ndarray) -> None:
        view[at : at + len(data)] = data

    result = fill(mib, put, transaction.commit, copies=copies)
    faults = counters()["write_faults"] - before["write_faults"]
    return result | {"faults": faults, "faults_per_mib": faults / mib}


@side("write.view")
def write_view(place: Place) -> dict[str, Any]:
    """dask_zbig: fill a view; commit (fsync of the blob and of Data.fs) every 64 MiB."""
    with opened(place.path("x.fs")) as connection:
        return _view(new_array(connection, place.mib << 17), place.mib)


@side("write.assign")
def write_assign(place: Place) -> dict[str, Any]:
    """dask_zbig: A[i:j] = x; commit every 64 MiB."""
    with opened(place.path("assign.fs")) as connection:
        array = new_array(connection, place.mib << 17)
        result = fill(
            place.mib, lambda at, data: array.__setitem__(slice(at, at + len(data)), data), transaction.commit
        )
        result["faults"] = counters()["write_faults"]
        check(float(array.sum()), place.mib)
    discard(place.path("assign.fs"))
    return result


@side("write.append")
def write_append(place: Place) -> dict[str, Any]:
    """dask_zbig: A.append(x) of 64 MiB; commit after each."""
    with opened(place.path("append-bulk.fs")) as connection:
        array = new_array(connection, 0)
        result = fill(place.mib, lambda _, data: array.append(data), transaction.commit)
        result["faults"] = counters()["write_faults"]
        check(float(array.sum()), place.mib)
    discard(place.path("append-bulk.fs"))
    return result


@side("write.zeo")
def write_zeo(place: Place) -> dict[str, Any]:
    """dask_zbig over ZEO with a shared blob directory: as write.view; the server syncs the blobs' directories."""
    with served(place.path("zeo.fs")) as uri, opened(uri) as connection:
        result = _view(new_array(connection, place.mib << 17), place.mib)
        check(float(connection.root()["A"].sum()), place.mib)
    discard(place.path("zeo.fs"))
    return result


@side("write.zeo-cache", warm=2)
def write_zeo_cache(place: Place) -> dict[str, Any]:
    """dask_zbig over ZEO with a blob cache of the client's own: blobs are uploaded; the server syncs them."""
    cache = place.path("write-cache")
    with served(place.path("zeo-cache.fs"), cache=cache) as uri, opened(uri) as connection:
        result = _view(new_array(connection, place.mib << 17), place.mib, copies=2)
        check(float(connection.root()["A"].sum()), place.mib)
    discard(place.path("zeo-cache.fs"))
    discard(cache)
    return result


# -- read


def _summed(connection: Any, mib: int) -> dict[str, Any]:
    """Timed: find the array, view it, sum it."""
    before = counters()["read_faults"]
    start = time.perf_counter()
    view = connection.root()["A"][:]
    viewed = time.perf_counter() - start
    total = float(view.sum())
    seconds = time.perf_counter() - start
    check(total, mib)
    faults = counters()["read_faults"] - before
    return {"seconds": seconds, "view": viewed, "read_faults": faults, "mappings": mappings()}


@side("read.memmap", needs=["write.memmap"])
def read_memmap(place: Place) -> dict[str, Any]:
    """np.memmap of the file that np.memmap wrote: open in a fresh process, sum."""
    reread(place.path("memmap"))
    start = time.perf_counter()
    total = float(np.memmap(place.path("memmap"), "f8", "r").sum())
    seconds = time.perf_counter() - start
    check(total, place.mib)
    return {"seconds": seconds}


@side("read.view", needs=["write.view"])
def read_view(place: Place) -> dict[str, Any]:
    """dask_zbig: in a fresh process, view and sum. Opening the database is not timed."""
    reread(place.path("x.fs"))
    with opened(place.path("x.fs")) as connection:
        return _summed(connection, place.mib)


def segments(path: str) -> list[str]:
    """The blob files of a database, that have an array's data."""
    found = glob.glob(os.path.join(path + ".blobs", "**", "*.blob"), recursive=True)
    return sorted(file for file in found if os.path.getsize(file) >= PIECE)


@side("read.segments", needs=["write.view"])
def read_segments(place: Place) -> dict[str, Any]:
    """np.memmap of the blob files that dask_zbig wrote: open each in a fresh process, sum."""
    files = segments(place.path("x.fs"))
    reread(place.path("x.fs"))
    start = time.perf_counter()
    total = sum(float(np.memmap(file, "f8", "r").sum()) for file in files)
    seconds = time.perf_counter() - start
    check(total, place.mib)
    return {"seconds": seconds, "files": len(files)}


@side("read.zeo", needs=["write.view"])
def read_zeo(place: Place) -> dict[str, Any]:
    """dask_zbig over ZEO with a shared blob directory: as read.view."""
    reread(place.path("x.fs"))
    with served(place.path("x.fs")) as uri, opened(uri) as connection:
        return _summed(connection, place.mib)


@side("read.zeo-cache", needs=["write.view"], warm=2)
def read_zeo_cache(place: Place) -> dict[str, Any]:
    """dask_zbig over ZEO from a blob cache: one client has read the array (untimed, downloads it), a new one reads."""
    with served(place.path("x.fs"), cache=place.path("read-cache")) as uri:
        with opened(uri) as connection:
            cold = _summed(connection, place.mib)["seconds"]
        reread(place.path("read-cache"))
        with opened(uri) as connection:
            return _summed(connection, place.mib) | {"cold": cold}


# -- elements


def _looked_up(view: np.ndarray, start: float) -> dict[str, Any]:
    got = [view[at] for at in (ELEMENTS * len(view)).astype("i8").tolist()]
    seconds = time.perf_counter() - start
    expected = (ELEMENTS * len(view)).astype("i8") % len(source())
    assert np.array_equal(got, expected)
    return {"seconds": seconds}


@side("random.memmap", needs=["write.memmap"])
def random_memmap(place: Place) -> dict[str, Any]:
    """np.memmap: 2,000 random elements through a fresh mapping, opening it included."""
    start = time.perf_counter()
    return _looked_up(np.asarray(np.memmap(place.path("memmap"), "f8", "r")), start)


@side("random.view", needs=["write.view"])
def random_view(place: Place) -> dict[str, Any]:
    """dask_zbig: 2,000 random elements through a fresh view, making it included, opening the database not."""
    with opened(place.path("x.fs")) as connection:
        array = connection.root()["A"]
        len(array)
        start = time.perf_counter()
        view = array[:]
        return _looked_up(view, start) | {"read_faults": counters()["read_faults"]}


@side("index.hot", needs=["write.view"])
def index_hot(place: Place) -> dict[str, Any]:
    """dask_zbig: A[i] and A[i:j] on an open array, in a loop; np.memmap's for comparison."""
    mapped = np.memmap(place.path("x"), "f8", "w+", shape=(1 << 17,))
    with opened(place.path("x.fs")) as connection:
        array = connection.root()["A"]
        assert array[12345] == 12345
        assert array[100:200].sum() == 14950
        before = counters()["fills"]
        found = {
            "item": per_call(lambda: array[12345]),
            "slice": per_call(lambda: array[100:200]),
            "memmap_item": per_call(lambda: mapped[12345]),
            "memmap_slice": per_call(lambda: mapped[100:200]),
        }
        return found | {"fills": counters()["fills"] - before}
