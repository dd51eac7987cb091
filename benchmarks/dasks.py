"""Dask: a sum over an array and a store into one, by threads and by two processes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import transaction

import dask_zbig as dz
from benchmarks.measure import STEP, Tree, check, discard, opened, served, source, warm
from benchmarks.model import Place, side
from benchmarks.peers import VARIANTS, open_store

CHUNK = STEP // 8  # elements; 64 MiB, for everybody
REPEATS = 3


class Mapped:
    """A file that np.memmap reads, opened where it is used."""

    ndim, dtype = 1, np.dtype("f8")

    def __init__(self, path: str, n: int) -> None:
        self.path, self.shape = path, (n,)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(np.memmap(self.path, "f8", "r")[index])


class Stored(Mapped):
    """An array in a peer's hands, opened where it is used."""

    def __init__(self, peer: str, path: str, n: int) -> None:
        super().__init__(path, n)
        self.peer = peer

    def __getitem__(self, index: Any) -> np.ndarray:
        part = index[0] if isinstance(index, tuple) else index
        store = open_store(self.peer, self.path)
        try:
            return store.get(*part.indices(self.shape[0])[:2])
        finally:
            store.close()


def _blocks(thing: Mapped) -> Any:
    return da.from_array(thing, chunks=CHUNK, asarray=False, meta=np.empty(0, "f8"))


def two_processes() -> Any:
    """A cluster of two workers with a thread each."""
    from distributed import Client, LocalCluster

    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    client = Client(cluster)
    client.run(lambda: __import__("numpy"))
    return cluster, client


def _sums(place: Place, make: Callable[[], Any], repeats: int = REPEATS) -> dict[str, Any]:
    """Seconds of `make().sum().compute()`, the median of some after an untimed one: by 2 threads, by 2 processes."""

    def measure(**options: Any) -> float:
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            total = float(make().sum().compute(**options))
            seconds.append(time.perf_counter() - start)
            check(total, place.mib)
        return statistics.median(seconds[1:])

    result = {"threads": measure(scheduler="threads", num_workers=2)}
    cluster, client = two_processes()
    with cluster, client:
        result["processes"] = measure()
    return result


@side("dask.memmap", needs=["write.memmap"])
def dask_memmap(place: Place) -> dict[str, Any]:
    """Dask over np.memmap, which each task opens."""
    return _sums(place, lambda: _blocks(Mapped(place.path("memmap"), place.mib << 17)))


@side("dask.view", needs=["write.view"])
def dask_view(place: Place) -> dict[str, Any]:
    """Dask over from_zbigarray, with a ZEO server."""
    with served(place.path("x.fs")) as uri, opened(uri) as connection:
        return _sums(place, lambda: dz.from_zbigarray(connection.root()["A"], chunks=CHUNK))


def _sum_of(peer: str, chunk: int, place: Place) -> dict[str, Any]:
    path = place.path(f"{peer}-{chunk}")
    if peer == "zarr":
        return _sums(place, lambda: da.from_zarr(path, chunks=CHUNK), 1)
    return _sums(place, lambda: _blocks(Stored(peer, path, place.mib << 17)), 1)


# -- store


def _made(n: int) -> Any:
    """What is stored: the source again and again, made by the tasks."""
    return da.map_blocks(_piece, chunks=((CHUNK,) * (n // CHUNK),), dtype="f8", meta=np.empty(0, "f8"))


def _piece() -> np.ndarray:
    return source()


def _stored(place: Place, store: Callable[[int, Any], None]) -> dict[str, Any]:
    """Seconds to compute and store an array: the median of some, after an untimed one of 128 MiB."""
    cluster, client = two_processes()
    with cluster, client:
        store(0, _made(2 * CHUNK))
        seconds = []
        for i in range(1, 2 if place.quick else 3):
            warm(place.mib << 21)
            start = time.perf_counter()
            store(i, _made(place.mib << 17))
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds)}


@side("store.view")
def store_view(place: Place) -> dict[str, Any]:
    """dask_zbig over ZEO: to_zbigarray by two processes, then commit; workers sync what they stage."""
    with served(place.path("store.fs")) as uri, opened(uri) as connection:

        def store(i: int, x: Any) -> None:
            connection.root()["A"] = array = dz.ZBigArray(x.shape)
            transaction.commit()
            dz.to_zbigarray(x, array)
            transaction.commit()

        result = _stored(place, store)
        check(float(connection.root()["A"][:].sum()), place.mib)
    discard(place.path("store.fs"))
    return result


@side("store.zarr", peer="zarr")
def store_zarr(place: Place) -> dict[str, Any]:
    """Zarr: da.to_zarr by two processes, raw chunks of 64 MiB, then fsync of all files."""
    import zarr

    def store(i: int, x: Any) -> None:
        path = place.path(f"store-{i}.zarr")
        array = zarr.create_array(path, shape=x.shape, chunks=(CHUNK,), dtype="f8", compressors=None, filters=None)
        da.to_zarr(x, array)
        Tree(path).sync()

    result = _stored(place, store)
    last: Any = zarr.open_array(place.path("store-1.zarr"), mode="r")
    check(sum(float(last[at : at + CHUNK].sum()) for at in range(0, last.shape[0], CHUNK)), place.mib)
    discard(place.path("store-"))
    return result


def _register() -> None:
    for peer, chunk in VARIANTS:
        measured = partial(_sum_of, peer, chunk)
        measured.__doc__ = f"Dask over {peer}, chunks of {chunk} MiB there and of 64 MiB in the graph."
        side(f"{peer}-{chunk}.dask", needs=[f"{peer}-{chunk}.write"], peer=peer)(measured)


_register()
