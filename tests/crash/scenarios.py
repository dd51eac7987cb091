"""Small commits for the scripts beside this, what a database holds, and which files it may leave."""

from __future__ import annotations

import hashlib
import os

import dask
import dask.array as da
import numpy as np
import transaction
from ZODB.POSException import POSKeyError

import dask_zbig as dz

SIZE = 20_000  # bytes of A
LIMIT = 4096  # larger changes become blobs, here

dask.config.set({"zbig.inline-limit": LIMIT, "zbig.load-timeout": 0.1, "scheduler": "synchronous"})


def prepare(root):
    """What is there before: two arrays that refer to a blob and inline segments, and an object that fits to them."""
    root["A"] = dz.ZBigArray(SIZE, "u1")
    root["B"] = dz.ZBigArray(100, "i4")
    root["A"][:] = 1
    root["B"][:] = 1
    root["k"] = 1
    transaction.commit()


# Each is a generator: what it does after its only `yield` is watched.


def inline(root):
    root["A"][100:300] = 2
    root["B"][5:20] = 2
    root["k"] = 2
    yield


def blob(root):
    root["A"][:] = 2
    root["k"] = 2
    yield


def both(root):
    root["A"][2000:] = 2
    root["B"][50:] = 2
    root["k"] = 2
    yield


def append(root):
    root["A"].append(np.full(3000, 2, "u1"))
    root["B"].append(np.full(10, 2, "i4"))
    root["k"] = 2
    yield


def resize(root):
    root["A"].resize(500)
    root["B"].resize(400)
    root["B"][390:] = 2
    root["k"] = 2
    yield


def savepoint(root):
    root["A"][:9000] = 2
    yield
    transaction.savepoint()
    root["A"][9000:9100] = 3
    root["B"][:] = 2
    root["k"] = 2


def first(root):
    root["C"] = dz.ZBigArray(SIZE, "u1")
    root["C"][:] = 3
    root["D"] = dz.ZBigArray(10, "i4")
    root["D"][2:4] = 3
    root["k"] = 2
    yield


def publish(root):
    with dz.CommitCoordinator(root._p_jar) as save:
        save.store(da.full(SIZE, 2, dtype="u1", chunks=9000), root["A"])
        save.append(da.full(20, 2, dtype="i4", chunks=10), root["B"])
        root["k"] = 2
        yield


def pack(root):
    yield
    root._p_jar.db().pack()


SCENARIOS = {f.__name__: f for f in (inline, blob, both, append, resize, savepoint, first, publish, pack)}


def content(root):
    """What there is, as text: arrays by shape and checksum."""
    out = []
    for name in sorted(root):
        value = root[name]
        if isinstance(value, dz.ZBigArray):
            out.append(f"{name}{value.shape}{hashlib.sha256(value[:].tobytes()).hexdigest()[:16]}")
        elif name == "k":
            out.append(f"k={value}")
    return " ".join(out)


def unknown_files(directory, db=None):
    """The files below `directory` that are neither a database x.fs's nor, if it is given, a committed blob of `db`."""
    known = {f"x.fs{end}" for end in ("", ".index", ".lock", ".tmp", ".oid", ".blobs/.layout")}
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.relpath(path, directory) not in known and not (name.endswith(".blob") and _committed(db, path)):
                found.append(os.path.relpath(path, directory))
    return found


def _committed(db, path):
    if db is None:
        return True
    oid, tid = db.storage.fshelper.splitBlobFilename(path)
    try:
        return bool(db.storage.loadSerial(oid, tid))
    except POSKeyError:
        return False
