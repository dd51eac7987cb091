"""Other stores of arrays, raw (no compression), in chunks of 2 and 64 MiB, made durable by fsync of what they write."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from benchmarks.bulk import ELEMENTS
from benchmarks.measure import Tree, check, discard, fill, reread, source, sync_file
from benchmarks.model import Place, side

__all__ = ["VARIANTS", "Store", "open_store"]


class Store(Protocol):
    """A one-dimensional array of float64 in a peer's hands."""

    def put(self, at: int, data: np.ndarray) -> None:
        """Write elements."""

    def get(self, start: int, stop: int) -> np.ndarray:
        """Read elements."""

    def grow(self, data: np.ndarray) -> None:
        """Append elements."""

    def sync(self) -> None:
        """Make what was written durable (for those who have transactions: commit it)."""

    def close(self) -> None:
        """Give all files back."""


class Zarr:
    """Zarr 3 in a local directory. Not atomic."""

    def __init__(self, path: str, new: int | None = None, chunk: int = 0) -> None:
        import zarr

        if new is None:
            self.array: Any = zarr.open_array(path, mode="r+")
        else:
            self.array = zarr.create_array(
                path, shape=(new,), chunks=(chunk,), dtype="f8", compressors=None, filters=None
            )
        self._path, self._tree, self._grown = path, Tree(path), False
        self._tree.sync()

    def put(self, at: int, data: np.ndarray) -> None:
        self.array[at : at + len(data)] = data

    def get(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.array[start:stop])

    def grow(self, data: np.ndarray) -> None:
        self.array.append(data)
        self._grown = True

    def sync(self) -> None:
        if self._grown:  # it is known which files an append changes
            last = (self.array.shape[0] - 1) // self.array.chunks[0]
            for name in (f"c/{last}", "zarr.json", "c", "."):
                sync_file(os.path.join(self._path, name))
            self._grown = False
        else:
            self._tree.sync()

    def close(self) -> None:
        pass


class Icechunk:
    """Icechunk in a local directory: a commit, and fsync of the files that it made."""

    def __init__(self, path: str, new: int | None = None, chunk: int = 0) -> None:
        import icechunk
        import zarr

        storage = icechunk.local_filesystem_storage(path)
        self._tree = Tree(path)
        if new is None:
            self._repository = icechunk.Repository.open(storage)
        else:
            self._repository = icechunk.Repository.create(storage)
            session = self._repository.writable_session("main")
            zarr.create_array(session.store, shape=(new,), chunks=(chunk,), dtype="f8", compressors=None, filters=None)
            session.commit("new")
        self._tree.sync()
        self._session: Any = None

    @property
    def array(self) -> Any:
        """As it was committed, read-only and picklable."""
        import zarr

        return zarr.open_array(self._repository.readonly_session("main").store, mode="r")

    def _writable(self) -> Any:
        import zarr

        if self._session is None:
            self._session = self._repository.writable_session("main")
        return zarr.open_array(self._session.store, mode="r+")

    def put(self, at: int, data: np.ndarray) -> None:
        self._writable()[at : at + len(data)] = data

    def get(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.array[start:stop])

    def getter(self) -> Callable[[int, int], np.ndarray]:
        """`get` with the array open."""
        array = self.array
        return lambda start, stop: np.asarray(array[start:stop])

    def grow(self, data: np.ndarray) -> None:
        self._writable().append(data)

    def sync(self) -> None:
        self._session.commit("more")
        self._session = None
        self._tree.sync()

    def close(self) -> None:
        pass


class H5py:
    """HDF5 by h5py: flush and fsync of the file. Not atomic."""

    def __init__(self, path: str, new: int | None = None, chunk: int = 0) -> None:
        h5py: Any = importlib.import_module("h5py")
        self._file = h5py.File(path, "r" if new is None else "w", libver="latest")
        if new is not None:
            self._file.create_dataset("A", (new,), "f8", chunks=(chunk,), maxshape=(None,))
        self.array = self._file["A"]

    def put(self, at: int, data: np.ndarray) -> None:
        self.array[at : at + len(data)] = data

    def get(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.array[start:stop])

    def grow(self, data: np.ndarray) -> None:
        n = self.array.shape[0]
        self.array.resize((n + len(data),))
        self.array[n:] = data

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.id.get_vfd_handle())

    def close(self) -> None:
        self._file.close()


class TileDB:
    """TileDB, dense: each write is a fragment; fsync of the files that it made. A fragment is atomic."""

    def __init__(self, path: str, new: int | None = None, chunk: int = 0) -> None:
        tiledb: Any = importlib.import_module("tiledb")
        self._path, self._tiledb = path, tiledb
        if new is not None:
            dimension = tiledb.Dim("i", domain=(0, 2 * new + chunk - 1), tile=chunk, dtype="u8")
            schema = tiledb.ArraySchema(tiledb.Domain(dimension), attrs=[tiledb.Attr("a", dtype="f8")])
            tiledb.Array.create(path, schema)
        self._end, self._tree = new or 0, Tree(path)
        self._tree.sync()
        self._reader: Any = None

    def put(self, at: int, data: np.ndarray) -> None:
        with self._tiledb.open(self._path, "w") as array:
            array[at : at + len(data)] = data

    def get(self, start: int, stop: int) -> np.ndarray:
        if self._reader is None:
            self._reader = self._tiledb.open(self._path, "r")
        return np.asarray(self._reader[start:stop]["a"])

    def grow(self, data: np.ndarray) -> None:
        self.put(self._end, data)
        self._end += len(data)

    def sync(self) -> None:
        self._tree.sync()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


CLASSES: dict[str, Callable[..., Store]] = {"zarr": Zarr, "icechunk": Icechunk, "h5py": H5py, "tiledb": TileDB}
#: Peer and chunk size in MiB.
VARIANTS = [("zarr", 2), ("zarr", 64), ("icechunk", 2), ("icechunk", 64), ("h5py", 2), ("tiledb", 2), ("tiledb", 64)]


def open_store(peer: str, path: str) -> Store:
    """Open what was written."""
    importlib.import_module(peer)
    return CLASSES[peer](path)


def _write(peer: str, chunk: int, place: Place) -> dict[str, Any]:
    store = CLASSES[peer](place.path(f"{peer}-{chunk}"), place.mib << 17, chunk << 17)
    result = fill(place.mib, store.put, store.sync)
    store.close()
    return result


def _read(peer: str, chunk: int, place: Place) -> dict[str, Any]:
    store = open_store(peer, place.path(f"{peer}-{chunk}"))
    n, total = place.mib << 17, 0.0
    reread(place.path(f"{peer}-{chunk}"))
    start = time.perf_counter()
    for at in range(0, n, len(source())):  # piece by piece, which is faster than all at once
        total += float(store.get(at, at + (8 << 20)).sum())
    seconds = time.perf_counter() - start
    check(total, place.mib)
    store.close()
    return {"seconds": seconds}


def _random(peer: str, chunk: int, place: Place) -> dict[str, Any]:
    store = open_store(peer, place.path(f"{peer}-{chunk}"))
    reads = place.times(100 if chunk == 2 else 20)
    where = (ELEMENTS[:reads] * (place.mib << 17)).astype("i8").tolist()
    get = store.getter() if isinstance(store, Icechunk) else store.get
    start = time.perf_counter()
    got = [get(at, at + 1)[0] for at in where]
    seconds = (time.perf_counter() - start) / reads
    assert got == [at % (8 << 20) for at in where]
    store.close()
    return {"seconds": seconds * len(ELEMENTS), "reads": reads}


def _append(peer: str, chunk: int, place: Place) -> dict[str, Any]:
    row, times = np.arange(128.0), place.times(30 if chunk == 2 else 10)
    path = place.path(f"{peer}-{chunk}-small")
    store = CLASSES[peer](path, 8 << 20, chunk << 17)
    store.put(0, source())
    store.sync()
    store.grow(row)
    store.sync()
    start = time.perf_counter()
    for _ in range(times):
        store.grow(row)
        store.sync()
    seconds = (time.perf_counter() - start) / times
    got = store.get(8 << 20, (8 << 20) + (times + 1) * len(row))
    assert np.array_equal(got, np.tile(row, times + 1))
    store.close()
    discard(path)
    return {"seconds": seconds}


def _register() -> None:
    for peer, chunk in VARIANTS:
        name = f"{peer}-{chunk}"
        for what, run, needs in (
            ("write", _write, []),
            ("read", _read, [f"{name}.write"]),
            ("random", _random, [f"{name}.write"]),
            ("append", _append, []),
        ):
            measured = partial(run, peer, chunk)
            measured.__doc__ = f"{peer}, chunks of {chunk} MiB: {CLASSES[peer].__doc__}"
            side(f"{name}.{what}", needs=needs, peer=peer)(measured)


_register()
