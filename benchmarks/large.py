"""Arrays that are large, sparse or in many pieces, and transactions larger than memory."""

from __future__ import annotations

import os
import resource
import statistics
import time
from typing import Any

import numpy as np
import transaction

import dask_zbig as dz
from benchmarks.bulk import new_array
from benchmarks.measure import STEP, Peak, anonymous, discard, mappings, median_of, opened, source, warm
from benchmarks.model import Place, side
from dask_zbig.memory._native import counters

# -- sparse

VIEW = 1 << 40  # bytes that are viewed at most


def _sparse(place: Place, name: str, size: int) -> dict[str, Any]:
    path, seconds = place.path(f"sparse-{name}.fs"), []
    with opened(path) as connection:
        new_array(connection, size // 8)
    for i in range(7):
        db = dz.open(path)
        start = time.perf_counter()
        connection = db.open()
        view = connection.root()["A"][-(VIEW // 8) :]
        assert view[len(view) // 2] == 0
        view[-1 - i * 1000] = 7
        transaction.commit()
        seconds.append(time.perf_counter() - start)
        assert connection.root()["A"][size // 8 - 1 - i * 1000] == 7
        del view
        connection.close()
        db.close()
    return {"seconds": statistics.median(seconds), "mappings": mappings()}


@side("sparse.gib")
def sparse_gib(place: Place) -> dict[str, Any]:
    """dask_zbig: a new connection to a sparse array of 1 GiB: view all, read one element, change one, commit."""
    return _sparse(place, "gib", 1 << 30)


@side("sparse.tib")
def sparse_tib(place: Place) -> dict[str, Any]:
    """dask_zbig: the same for 1 TiB."""
    return _sparse(place, "tib", 1 << 40)


@side("sparse.pib")
def sparse_pib(place: Place) -> dict[str, Any]:
    """dask_zbig: the same for 1 PiB, of which the last TiB is viewed: a process on x86-64 has 128 TiB of addresses."""
    return _sparse(place, "pib", 1 << 50)


# -- fragments


FRESH = 5  # times that it is opened anew


def _pages(place: Place) -> int:
    return 10_000 if place.quick else 100_000


@side("fragments.write", warm=1, once=True)
def fragments_write(place: Place) -> dict[str, Any]:
    """dask_zbig: every other page of an array is overwritten by later transactions: 100,000 extents."""
    pages = _pages(place)
    with opened(place.path("fragments.fs")) as connection:
        array = new_array(connection, (pages, 512))
        array[:] = 1
        transaction.commit()
        view = array[:]
        start = time.perf_counter()
        for at in range(0, pages, 4000):
            view[at : at + 4000 : 2] = 2
            transaction.commit()
        seconds = time.perf_counter() - start
        result = {"seconds": seconds, "write_faults": counters()["write_faults"]}
    np.full((pages, 512), 1.5).tofile(place.path("fragments"))
    return result


@side("fragments.memmap", needs=["fragments.write"], once=True)
def fragments_memmap(place: Place) -> dict[str, Any]:
    """np.memmap: open a file of as many bytes, sum. Median of 5."""

    def once() -> float:
        start = time.perf_counter()
        total = float(np.memmap(place.path("fragments"), "f8", "r").sum())
        seconds = time.perf_counter() - start
        assert total == _pages(place) * 768
        return seconds

    return {"sum": median_of(FRESH, once)}


@side("fragments.read", needs=["fragments.write"], once=True)
def fragments_read(place: Place) -> dict[str, Any]:
    """dask_zbig: view an array of 100,000 extents, sum it; its extent map is in no cache of ZODB's. Median of 5."""
    found = [_fragments(place) for _ in range(FRESH)]
    return {key: statistics.median(result[key] for result in found) for key in found[0]}


def _fragments(place: Place) -> dict[str, float]:
    with opened(place.path("fragments.fs")) as connection:
        array, faults = connection.root()["A"], counters()["read_faults"]
        warm(_pages(place) << 12)
        start = time.perf_counter()
        view = array[:]
        viewed = time.perf_counter() - start
        total = float(view.sum())
        summed = time.perf_counter() - start - viewed
        assert total == _pages(place) * 768
        again = time.perf_counter()
        assert float(view.sum()) == total
        again = time.perf_counter() - again
        extents = sum(len(leaf.extents) for _, leaf in array._file.leaves(0, view.nbytes))
        found = {"view": viewed, "sum": summed, "again": again, "mappings": mappings(), "extents": extents}
        return found | {"read_faults": counters()["read_faults"] - faults}


# -- commit cost against bytes changed


@side("change.sizes", once=True)
def change_sizes(place: Place) -> dict[str, Any]:
    """dask_zbig: 4 KiB ... 4 GiB of an array of 8 GiB changed through a view, and committed; fsync as in write.view."""
    data = source()
    result: dict[str, Any] = {}
    with opened(place.path("change.fs")) as connection:
        root = connection.root()
        root["small"] = small = dz.ZBigArray(STEP // 8)
        root["large"] = large = dz.ZBigArray((place.mib << 17) * 8)
        transaction.commit()
        small[:] = data
        for at in range(0, len(large), len(data)):
            large[at : at + len(data)] = data
            if at % (8 * len(data)) == 0:
                transaction.commit()
        transaction.commit()
        os.sync()
        for name, array in (("small", small), ("large", large)):
            view = array[:]
            result[name] = statistics.median(_change(view, 4 << 10, i)[0] for i in range(9))
        view, worst = large[:], 0
        sizes = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20, place.mib << 22]
        for size in sizes:
            times = [_change(view, size, i) for i in range(3 if size < 1 << 30 else 1)]
            seconds = statistics.median(t[0] for t in times)
            commit = statistics.median(t[1] for t in times)
            worst = max(worst, *(t[2] for t in times))
            label = f"{size >> 20}MiB" if size >> 20 else f"{size >> 10}KiB"
            result |= {label: seconds, f"{label}_commit": commit}
        # seconds a byte of the largest change and of the one of 256 MiB
        result |= {"per_gib": seconds * (1 << 30) / size, "per_gib_256": result["256MiB"] * 4}
        result |= {"peak": worst, "mappings": mappings()}
        assert view[0] == len(times) + 1
        assert view[-1] == data[-1]
        del view
    discard(place.path("change.fs"))
    return result


def _change(view: np.ndarray, size: int, i: int) -> tuple[float, float, int]:
    """Change so many bytes, commit: seconds of both, of the commit, and the most anonymous memory that took."""
    if size >= STEP:
        warm(size)
    with Peak() as peak:
        start = time.perf_counter()
        view[: size // 8] = i + 2
        changed = time.perf_counter()
        transaction.commit()
        end = time.perf_counter()
    return end - start, end - changed, peak.bytes


# -- more than memory


@side("limit.transaction", warm=1)
def limit_transaction(place: Place) -> dict[str, Any]:
    """dask_zbig: the process may have 64 MiB more of private memory (RLIMIT_DATA); one transaction changes 512 MiB."""
    limit = 64 << 20
    amount = (limit * 2 if place.quick else limit * 8) // 8
    with opened(place.path("limit.fs")) as connection:
        array = new_array(connection, amount)
        view = array[:]
        view[::512] = 0
        transaction.abort()
        data = np.arange(1 << 17, dtype="f8")
        with open("/proc/self/status") as status:
            used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
        try:
            np.ones(2 * limit // 8)
        except MemoryError:
            pass
        else:
            raise AssertionError("the limit does not hold")
        before, start = anonymous(), time.perf_counter()
        for at in range(0, amount, len(data)):
            view[at : at + len(data)] = data
        transaction.commit()
        seconds = time.perf_counter() - start
        assert float(view.sum()) == float(data.sum()) * (amount // len(data))
        return {"seconds": seconds, "anonymous": anonymous() - before, "limit_over_amount": limit / (amount * 8)}
