"""The processes of the fault matrix: a server, a client that saves versions, a reader that looks at every snapshot.

Run as a script, which may import nothing of the tests but what lies beside it. A version `k` is four arrays that
belong together: ``A``, of blobs; ``B``, made of A, of inline segments; ``C``, the sums of both; and the log ``L``, to
which one row is appended by each version.
"""

from __future__ import annotations

import contextlib
import functools
import json
import select
import sys

import dask
import dask.array as da
import numpy as np
import transaction
from distributed import Client
from ZODB.POSException import POSError

import dask_zbig as dz
from dask_zbig.database import sync

N = 30_000
CHUNK = 10_000  # 80 kB of A, more than what is stored inline
PAUSE = 0.005  # seconds between a reader's looks: it is not alone on the machine
COMMON = 4000  # elements of the array that two clients write to


def new(root):
    """What version 0 looks like."""
    root["A"] = dz.ZBigArray(N, "f8")
    root["B"] = dz.ZBigArray(N, "i4")
    root["C"] = dz.ZBigArray(3, "f8")
    root["L"] = dz.ZBigArray((0, 2), "f8")
    root["common"] = dz.ZBigArray((2, COMMON), "f8")


def version(numbers, k):
    """The values of A and B, from the numbers up to N: as NumPy arrays or as Dask's."""
    a = (numbers * 7.0 + k * 1009) % 65521
    return a, (a[::-1] * 2 + k).astype("i4")


@functools.cache
def sums(k):
    a, b = version(np.arange(N), k)
    return float(a.sum()), float(b.sum())


def seen(root):
    """The version that a snapshot shows. An AssertionError if it is none, or not a whole one."""
    arrays = [root[name] for name in "ABCL"]
    for array in arrays:
        array.prefetch()
    a, b, (k, *others), log = (array[...] for array in arrays)
    k = int(k)
    expected = version(np.arange(N), k) if k else (np.zeros(N), np.zeros(N, "i4"))
    for name, shown, wanted in zip("AB", (a, b), expected, strict=True):
        wrong = np.flatnonzero(shown != wanted)
        assert wrong.size == 0, f"version {k}: {name} has {wrong.size} wrong, from {wrong[:1]}: {shown[wrong[:5]]}"
    assert others == (list(sums(k)) if k else [0, 0]), f"version {k}: C has {others}"
    assert log.tolist() == [[j, sums(j)[0]] for j in range(1, k + 1)], f"version {k}: L has {log.tolist()}"
    return k


# -- a client


class Saver:
    """Does what it is told, and says how it went."""

    def __init__(self, uri, scheduler):
        self.dask = Client(scheduler)
        self.db = dz.open(uri)
        self.connection = self.db.open(transaction.TransactionManager())
        self.coordinator = None

    def begin(self):
        """A new transaction, which sees what the server has."""
        self.connection.transaction_manager.abort()
        sync(self.db)
        return self.connection.root()

    def save(self, k, how):
        """Save version `k`, in one of the ways in which a user may."""
        return getattr(self, f"save_by_{how}")(k, self.begin())

    def stores(self, k, root):
        """What to store, where, and whether at its end."""
        a, b = version(da.arange(N, chunks=CHUNK), k)
        c = da.stack([da.full((), k), a.sum(), b.sum()]).astype("f8")
        row = da.stack([da.full((), k), a.sum()])[None].astype("f8")
        parts = [
            (a, "A", False),
            (b.rechunk(N // 2), "B", False),
            (c.rechunk(3), "C", False),
            (row.rechunk(2), "L", True),
        ]
        return [(x, root[name], append) for x, name, append in parts]

    def save_by_coordinator(self, k, root):
        self.coordinator = save = dz.CommitCoordinator(self.connection, job_id=f"run-{k}")
        with save:
            save.progress.append(hears)
            for x, array, append in self.stores(k, root):
                (save.append if append else save.store)(x, array)
        return save.result.tid is None

    def save_by_transaction(self, k, root):
        """With something of the user's own in it."""
        results = [dz.to_zbigarray(x, A, append=end, job_id=f"run-{k}") for x, A, end in self.stores(k, root)]
        root["k"] = k
        self.connection.transaction_manager.commit()
        return all(result.bytes == 0 for result in results)

    def save_by_delayed(self, k, root):
        """Staged first, published when all of it is."""
        stores = self.stores(k, root)
        name = f"run-{k}"
        try:
            later = [dz.to_zbigarray(x, A, append=end, job_id=name, compute=False) for x, A, end in stores]
        except dz.PublishError as error:
            if "saved already" in str(error):
                return True
            raise
        staged = dask.compute(*later)
        self.begin()
        for one, (_, array, _) in zip(staged, stores, strict=True):
            one.publish(array)
        self.connection.transaction_manager.commit()
        for one in staged:
            one.discard()
        return False

    def retry(self):
        """Publish again what the coordinator has staged."""
        self.connection.transaction_manager.abort()
        return self.coordinator.retry().tid is None

    def fill(self, row, lo, hi, value):
        """Save a part of a row of the array that others write to at the same time."""
        root = self.begin()
        save = dz.CommitCoordinator(self.connection)
        try:
            with save:
                save.store(da.full(hi - lo, value, chunks=-1), root["common"], region=np.s_[row, lo:hi])
        except dz.SaveConflictError:
            save.discard()
            raise
        return False


def hears(progress):
    import steps

    steps.at("client hears of a chunk")


def client(uri, scheduler):
    import steps

    steps.watch_client()
    saver = Saver(uri, scheduler)
    answer({"ready": True})
    for line in sys.stdin:
        name, *args = json.loads(line)
        try:
            answer({"saved": True, "before": getattr(saver, name)(*args)})
        except Exception as error:  # noqa: BLE001 - what it is the test decides
            answer({"saved": False, "error": type(error).__name__, "text": str(error)[:500]})


# -- a reader


def reader(uri):
    """Look at all snapshots, until a line is read, and once more; then say what was seen."""
    from ZEO.Exceptions import ClientDisconnected
    from ZODB.POSException import POSKeyError, ReadConflictError

    db = dz.open(uri)
    connection = db.open(transaction.TransactionManager())
    looks, versions, gone = 0, set(), 0
    answer({"ready": True})
    ended = False
    while not ended or looks <= 10:  # (what was seen in a few looks says little)
        ended = select.select([sys.stdin], [], [], PAUSE)[0]
        try:
            sync(db)
            connection.transaction_manager.begin()
            versions.add(seen(connection.root()))
            looks += 1
        except (ClientDisconnected, dz.DatabaseUnavailableError, dz.LoadError, POSKeyError, ReadConflictError):
            gone += 1  # the server was killed, or packed this snapshot away
        finally:
            with contextlib.suppress(POSError):
                connection.transaction_manager.abort()
    answer({"looks": looks, "versions": sorted(versions), "gone": gone})


# -- a server


def server(path, socket):
    """``dask-zbig serve``."""
    import steps

    from dask_zbig.cli.main import main

    steps.watch_server()
    main(["serve", path, "--socket", socket])


def answer(what):
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    import faulthandler
    import signal

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    {"client": client, "reader": reader, "server": server}[sys.argv[1]](*sys.argv[2:])
