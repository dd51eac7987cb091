"""What is measured. Each side of a case runs in a fresh process: ``python benchmarks/cases.py SIDE DIR MIB``.

It prints one line of JSON: the seconds that count, and whatever else the case found. Every case checks its
result; one that is wrong exits non-zero.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import transaction

import dask_zbig as dz
from dask_zbig.memory._native import counters

STEP = 64 << 20  # bytes written between two syncs


def _source() -> np.ndarray:
    return np.arange(STEP // 8, dtype="f8")


def _expected(mib: int) -> float:
    return float(_source().sum()) * (mib * (1 << 20) // STEP)


def memmap_write(path: str, mib: int) -> dict[str, Any]:
    """Fill a new file through a mapping; flush (msync, which waits for the disk) after every 64 MiB."""
    n, source = mib << 17, _source()
    array = np.memmap(os.path.join(path, "memmap"), "f8", "w+", shape=(n,))
    start, synced = time.perf_counter(), 0.0
    for i in range(0, n, len(source)):
        array[i : i + len(source)] = source
        t = time.perf_counter()
        array.flush()
        synced += time.perf_counter() - t
    return {"seconds": time.perf_counter() - start, "sync": synced}


def zbig_write(path: str, mib: int) -> dict[str, Any]:
    """The same through a view; commit (which waits for the disk) after every 64 MiB."""
    n, source = mib << 17, _source()
    db = dz.open(os.path.join(path, "x.fs"))
    connection = db.open()
    connection.root()["A"] = array = dz.ZBigArray(n)
    transaction.commit()
    start, synced = time.perf_counter(), 0.0
    view = array[:]
    for i in range(0, n, len(source)):
        view[i : i + len(source)] = source
        t = time.perf_counter()
        transaction.commit()
        synced += time.perf_counter() - t
    seconds = time.perf_counter() - start
    faults = counters()["write_faults"]
    connection.close()
    db.close()
    return {"seconds": seconds, "sync": synced, "write_faults": faults}


def plain_write(path: str, mib: int) -> dict[str, Any]:
    """What the disk does: write(2) of the source in pieces of 2 MiB; fsync after every 64 MiB."""
    source, synced = memoryview(_source()).cast("B"), 0.0
    start = time.perf_counter()
    with open(os.path.join(path, "plain"), "wb", buffering=0) as file:
        for _ in range(0, mib << 20, STEP):
            for at in range(0, STEP, 2 << 20):
                file.write(source[at : at + (2 << 20)])
            t = time.perf_counter()
            os.fsync(file.fileno())
            synced += time.perf_counter() - t
    return {"seconds": time.perf_counter() - start, "sync": synced}


def _assigning(
    path: str, mib: int, name: str, rows: int, put: Callable[[Any, int, np.ndarray], None]
) -> dict[str, Any]:
    source = _source()
    db = dz.open(os.path.join(path, f"{name}.fs"))
    connection = db.open()
    connection.root()["A"] = array = dz.ZBigArray(rows)
    transaction.commit()
    start, synced = time.perf_counter(), 0.0
    for i in range(0, mib << 17, len(source)):
        put(array, i, source)
        t = time.perf_counter()
        transaction.commit()
        synced += time.perf_counter() - t
    seconds = time.perf_counter() - start
    faults = counters()["write_faults"]
    total = float(array.sum())
    assert abs(total / _expected(mib) - 1) < 1e-9, total
    connection.close()
    db.close()
    return {"seconds": seconds, "sync": synced, "write_faults": faults}


def zbig_assign(path: str, mib: int) -> dict[str, Any]:
    """``A[i:j] = x``; commit after every 64 MiB."""

    def put(array: Any, at: int, source: np.ndarray) -> None:
        array[at : at + len(source)] = source

    return _assigning(path, mib, "assign", mib << 17, put)


def zbig_grow(path: str, mib: int) -> dict[str, Any]:
    """``A.append(x)``, of 64 MiB each; commit after each."""
    return _assigning(path, mib, "grow", 0, lambda array, _, source: array.append(source))


def memmap_read(path: str, mib: int) -> dict[str, Any]:
    """Open in a fresh process, sum."""
    start = time.perf_counter()
    total = float(np.memmap(os.path.join(path, "memmap"), "f8", "r").sum())
    seconds = time.perf_counter() - start
    assert abs(total / _expected(mib) - 1) < 1e-9, total
    return {"seconds": seconds}


def zbig_read(path: str, mib: int) -> dict[str, Any]:
    """Open the database in a fresh process; then, timed: view, sum."""
    db = dz.open(os.path.join(path, "x.fs"))
    connection = db.open()
    start = time.perf_counter()
    view = connection.root()["A"][:]
    viewed = time.perf_counter() - start
    total = float(view.sum())
    seconds = time.perf_counter() - start
    assert abs(total / _expected(mib) - 1) < 1e-9, total
    found = {"seconds": seconds, "view": viewed, "read_faults": counters()["read_faults"]}
    del view
    connection.close()
    db.close()
    return found


def zbig_append(path: str, mib: int) -> dict[str, Any]:
    """Append 1 KiB to the array that was written, and commit, 500 times: seconds, and bytes grown, each."""
    file = os.path.join(path, "x.fs")
    db = dz.open(file)
    connection = db.open()
    array = connection.root()["A"]
    n, row, times = len(array), np.arange(128.0), 500
    array.append(row)
    transaction.commit()
    before = os.path.getsize(file)
    start = time.perf_counter()
    for _ in range(times):
        array.append(row)
        transaction.commit()
    seconds = (time.perf_counter() - start) / times
    grown = (os.path.getsize(file) - before) / times
    assert len(array) == n + (times + 1) * len(row)
    assert np.array_equal(array[n:].reshape(-1, len(row)), np.tile(row, (times + 1, 1)))
    connection.close()
    db.close()
    return {"seconds": seconds, "grown": grown}


def memmap_append(path: str, mib: int) -> dict[str, Any]:
    """Write 1 KiB at the end of the mapped file's part that is in use, and flush, 500 times."""
    array = np.memmap(os.path.join(path, "memmap"), "f8", "r+")
    row, times = np.arange(128.0), 500
    start = time.perf_counter()
    for i in range(times):
        array[i * 128 : (i + 1) * 128] = row
        array.flush()
    return {"seconds": (time.perf_counter() - start) / times}


def zbig_sparse(path: str, mib: int) -> dict[str, Any]:
    """A sparse array of 1 TiB: open, view whole, read one element, change one, commit."""
    file = os.path.join(path, "sparse.fs")
    db = dz.open(file)
    connection = db.open()
    connection.root()["S"] = dz.ZBigArray(1 << 37)
    transaction.commit()
    connection.close()
    db.close()
    db = dz.open(file)
    start = time.perf_counter()
    connection = db.open()
    view = connection.root()["S"][:]
    assert view[1 << 36] == 0
    view[12345678901] = 7
    transaction.commit()
    seconds = time.perf_counter() - start
    assert connection.root()["S"][12345678901] == 7
    del view
    connection.close()
    db.close()
    return {"seconds": seconds}


SIDES: dict[str, Callable[[str, int], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        *(memmap_write, plain_write, zbig_write, zbig_assign, zbig_grow),
        *(memmap_read, zbig_read, memmap_append, zbig_append, zbig_sparse),
    )
}

if __name__ == "__main__":
    side, directory, size = sys.argv[1:]
    print(json.dumps(SIDES[side](directory, int(size))))
