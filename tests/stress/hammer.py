"""A process in which many threads do everything that can be done to one array at once, and check every byte.

``python hammer.py ADDRESS [--threads 64] [--seconds 20] [--seed 0] [--directory DIR]``, with the path or URI of a
database, which loses all it has. Prints a line of JSON: what was done, and what the process (and DIR) had before and
after: descriptors, mappings, scratch files, ... Tests and, under sanitizers, CI run it by its path; it imports nothing
of the tests.

What is hammered: each *row* of array A has a version; word i of row r at version v is ``v << 40 | r << 20 | i``. So one
look tells whether all bytes of a row belong together and are in their place. A change of a row adds one to its version:
at the end, that is the number of changes whose commit was acknowledged. The rows beyond ROWS come and go by resize.

Who hammers: *crews*. A crew shares a connection: its first thread does the transactions, the others use its views.
- `Rows`, three helpers: two read whole rows in between the owner's steps, one reads at any time.
- `Slots`, three helpers: they write words of their own, which lie next to each other, at any time, into array S.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import random
import sys
import threading
import time
import traceback

import numpy as np
import transaction
from ZODB.POSException import ConflictError, ReadConflictError

import dask_zbig as dz
from dask_zbig.descriptors import close_unused

ROWS, WORDS = 2100, 1000  # 8,000 bytes a row: they do not begin at pages; 16.8 MB: 9 blocks
BULK = 300  # rows: more than a block
SLOTS = 400  # words of each thread in S
CREW = 4
WARM_UP = 3.0
#: What each run must have done, however short it is.
MUST = {"row changes", "bulk changes", "slot changes", "reads", "commits", "commits while others write", "aborts"}
MUST |= {"conflicts", "savepoints", "appends", "cache minimizations", "collections", "closings"}
SCRATCH = ("zbig", ".zbig", "BUC", "savepoint", "tmp")

_PLACE = np.arange(WORDS, dtype="u8")


def row_of(number, version):
    return np.uint64(version << 40 | number << 20) + _PLACE


class Wrong(AssertionError):
    """Bytes are not what they must be."""


def hexes(words):
    return " ".join(hex(x) for x in words[:5].tolist())


class Door:
    """Many may be inside, or one alone."""

    def __init__(self):
        self._changed = threading.Condition()
        self._inside = 0
        self._wanted = False

    @contextlib.contextmanager
    def open(self):
        with self._changed:
            self._changed.wait_for(lambda: not self._wanted)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def shut(self):
        with self._changed:
            self._wanted = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._wanted = False
                self._changed.notify_all()


class Hammer:
    """What all crews share."""

    def __init__(self, databases, threads, seed):
        self.databases = databases
        self.seed = seed
        self.stop = threading.Event()
        self.errors = []
        self.lock = threading.Lock()
        self.done = collections.Counter()
        self.acknowledged = np.zeros(ROWS, "u8")  # changes of each row
        self.crews = []
        for number in range(threads // CREW):
            kind = Slots if number % 4 == 3 else Rows
            self.crews.append(kind(self, number))

    def create(self):
        with self.databases[0].transaction() as connection:
            root = connection.root()
            root.clear()
            root["A"] = A = dz.ZBigArray((ROWS, WORDS), "u8")
            for r in range(ROWS):
                A[r] = row_of(r, 0)
            root["S"] = dz.ZBigArray((SLOTS, len(self.crews) * CREW), "u8")
        for db in self.databases:
            synchronize(db)

    def run(self, seconds, must, patience):
        """For `seconds`, and for up to `patience` more until all of `must` was done."""
        threads = [threading.Thread(target=self._guarded, args=(job,)) for crew in self.crews for job in crew.jobs()]
        for thread in threads:
            thread.start()
        self.stop.wait(seconds)
        end = time.monotonic() + patience
        while must - self.done.keys() and time.monotonic() < end and not self.stop.wait(0.1):
            pass
        self.stop.set()
        for thread in threads:
            thread.join()

    def _guarded(self, job):
        try:
            job()
        except BaseException:  # noqa: BLE001 - the main thread reports it
            self.errors.append(f"{threading.current_thread().name}: {traceback.format_exc()}")
            self.stop.set()

    def did(self, what, n=1):
        with self.lock:
            self.done[what] += n

    def check_all(self):
        """Everything, as a new connection sees it."""
        for db in self.databases:
            synchronize(db)
            with db.transaction() as connection:
                root = connection.root()
                A = root["A"]
                for r in range(len(A)):
                    version = check_row(A[r], r)
                    if r < ROWS and version != self.acknowledged[r]:
                        raise Wrong(
                            f"row {r} has version {version}, but {self.acknowledged[r]} changes of it were saved"
                        )
                S = root["S"][:]
                for crew in self.crews:
                    if isinstance(crew, Slots):
                        crew.check_end(S)


def synchronize(db):
    if hasattr(db.storage, "ping"):
        db.storage.ping()


def check_row(row, number):
    """Its version. Raises Wrong."""
    row = np.array(row)
    version = int(row[0]) >> 40
    expected = row_of(number, version)
    if not np.array_equal(row, expected):
        at = np.flatnonzero(row != expected)
        raise Wrong(
            f"row {number}: words {at[:5].tolist()}... ({len(at)} of {WORDS}) are {hexes(row[at])}, the first is "
            f"{hex(int(row[0]))}"
        )
    return version


class Crew:
    """Threads that share a connection."""

    def __init__(self, hammer, number):
        self.hammer = hammer
        self.number = number
        self.random = random.Random(f"{hammer.seed} {number}")
        self.db = hammer.databases[number % len(hammer.databases)]
        self.manager = transaction.TransactionManager()
        self.door = Door()  # shut while there are no views
        self.turn = threading.Lock()  # held by the owner, but in between its steps
        self.connection = self.a = None

    def jobs(self):
        return [self.own, *(lambda k=k: self.help(k) for k in range(1, CREW))]

    # -- the owner

    def own(self):
        """Views are open while the door is."""
        while not self.hammer.stop.is_set():
            with self.door.shut(), self.turn:
                self.connect()
            try:
                for _ in range(self.random.randrange(5, 40)):
                    self.transact()
                    if self.hammer.stop.is_set():
                        break
            finally:
                with self.door.shut(), self.turn:
                    self.disconnect()
            self.hammer.did("closings")

    def connect(self):
        self.connection = self.db.open(self.manager)
        self.look()

    def disconnect(self):
        self.manager.abort()
        self.a = None
        self.connection.close()
        self.connection = None

    def look(self):
        self.a = self.connection.root()["A"][:]

    def begin(self):
        synchronize(self.db)
        self.manager.begin()

    def disturb(self):
        what = self.random.randrange(20)
        if what == 0:
            self.connection.cacheMinimize()
            self.hammer.did("cache minimizations")
        elif what == 1:
            gc.collect()
            self.hammer.did("collections")
        elif what == 2:
            self.connection.cacheGC()
        elif what == 3:
            self.look()

    def help(self, k):
        number = self.number * CREW + k
        chance = random.Random(f"{self.hammer.seed} {self.number} {k}")
        while not self.hammer.stop.is_set():
            with self.door.open():
                if self.a is not None:
                    for _ in range(chance.randrange(1, 10)):
                        self.step(k, number, chance)
            time.sleep(chance.random() / 20)  # or the owners would hardly have the interpreter


class Rows(Crew):
    """Crews that change the same rows, and so conflict."""

    def choose(self):
        """Most are near each other: not all transactions shall conflict."""
        if self.random.randrange(5) == 0:
            return self.random.randrange(ROWS)
        home = self.number * ROWS // len(self.hammer.crews)
        return (home + self.random.randrange(ROWS // len(self.hammer.crews))) % ROWS

    def transact(self):
        with self.hammer.lock:
            floor = self.hammer.acknowledged.copy()
        with self.turn:
            self.begin()
            self.check_floor(floor)
        self.changed = {}
        for _ in range(self.random.randrange(1, 4)):
            with self.turn:
                self.change()
                self.disturb()
        with self.turn:
            if self.random.randrange(3) == 0:
                self.manager.abort()
                self.hammer.did("aborts")
                return
            try:
                self.manager.commit()
            except ConflictError as error:
                self.manager.abort()
                self.hammer.did("read conflicts" if isinstance(error, ReadConflictError) else "conflicts")
                return
        with self.hammer.lock:
            for r, n in self.changed.items():
                self.hammer.acknowledged[r] += n
        self.hammer.did("commits")

    def check_floor(self, floor):
        """What was acknowledged before the transaction began is there."""
        A = self.connection.root()["A"]
        self.a = A[:]
        for _ in range(3):
            r = self.choose()
            version = check_row(self.a[r], r)
            if version < floor[r]:
                raise Wrong(f"row {r} is old: it has version {version}, but {floor[r]} were saved before")
        r = len(A) - 1
        if r >= ROWS:
            check_row(A[r], r)

    def change(self):
        how = self.random.randrange(12)
        if how == 0:
            self.resize()
        elif how == 1:
            self.bulk()
        elif how in (2, 3):
            self.with_savepoint()
        else:
            for _ in range(self.random.randrange(1, 5)):
                self.change_row(self.choose(), how)

    def change_row(self, r, how=4):
        A = self.connection.root()["A"]
        version = check_row(self.a[r], r)
        new = row_of(r, version + 1)
        if how % 3 == 0:
            A[r] = new
        elif how % 3 == 1:
            self.a[r] = new
        else:
            view = A[r, : WORDS // 2]
            view[...] = new[: WORDS // 2]
            A[r, WORDS // 2 :] = new[WORDS // 2 :]
        if check_row(self.a[r], r) != version + 1:
            raise Wrong(f"row {r} has not become version {version + 1}")
        self.changed[r] = self.changed.get(r, 0) + 1
        self.hammer.did("row changes")

    def bulk(self):
        """Whole blocks at once: they are saved as blobs."""
        A = self.connection.root()["A"]
        start = self.random.randrange(ROWS - BULK)
        versions = [check_row(self.a[r], r) + 1 for r in range(start, start + BULK)]
        A[start : start + BULK] = np.array([row_of(start + k, v) for k, v in enumerate(versions)])
        for r in range(start, start + BULK):
            self.changed[r] = self.changed.get(r, 0) + 1
        self.hammer.did("bulk changes")

    def with_savepoint(self):
        kept, dropped = self.choose(), self.choose()
        if kept == dropped:
            return
        self.change_row(kept)
        before = check_row(self.a[dropped], dropped)
        savepoint = self.manager.savepoint()
        self.a[dropped] = row_of(dropped, before + 7)
        self.connection.root()["A"][kept] = 0
        savepoint.rollback()
        for r in (kept, dropped):
            check_row(self.a[r], r)
        if check_row(self.a[dropped], dropped) != before:
            raise Wrong(f"row {dropped} was not rolled back")
        self.hammer.did("savepoints")

    def resize(self):
        A = self.connection.root()["A"]
        if len(A) > ROWS and self.random.randrange(3) == 0:
            A.resize(len(A) - 1, WORDS)
            self.hammer.did("shrinkings")
        else:
            r = len(A)
            A.append([row_of(r, 1 + self.random.randrange(1000))])
            check_row(A[r], r)
            self.hammer.did("appends")

    def step(self, k, number, chance):
        """What a helper does."""
        a = self.a
        r = chance.randrange(ROWS)
        if k < 3:
            with self.turn:
                if self.a is not None:
                    check_row(self.a[r], r)
        else:  # the transaction may end meanwhile: then a part of the row is of another version
            row = np.array(a[r])
            if ((row ^ row_of(r, 0)) & np.uint64((1 << 40) - 1)).any():
                raise Wrong(f"row {r}: a word of another place: {hexes(row)}...")
        self.hammer.did("reads")


class Slots(Crew):
    """Crews whose helpers write words of their own while their owner commits: none may be lost."""

    def __init__(self, hammer, number):
        super().__init__(hammer, number)
        self.s = None
        self.idle = threading.Condition()
        self.committing = False
        self.losses = 0  # transactions that failed, and what they had with them
        self.synced = [0] * CREW
        self.values = [0] * CREW

    def look(self):
        super().look()
        self.s = self.connection.root()["S"][:]

    def disconnect(self):
        # what the helpers have written so far is to be kept
        self.commit()
        self.manager.abort()
        self.s = self.a = None
        self.connection.close()
        self.connection = None

    def transact(self):
        with self.turn:
            synchronize(self.db)
            self.manager.get()  # begins one, if none has begun: begin() would abort that, with what the helpers wrote
            self.disturb()
        time.sleep(0.02)
        with self.turn:
            if self.random.randrange(4) == 0:
                self.manager.savepoint()
            self.commit()

    def commit(self):
        with self.idle:
            self.committing = True
        lost = True
        try:
            self.manager.commit()
            lost = False
            self.hammer.did("commits while others write")
        except ConflictError:  # (in a storm of commits, one that joins small segments may conflict)
            self.manager.abort()
            self.hammer.did("conflicts while others write")
        finally:
            with self.idle:
                self.committing = False
                self.losses += lost
                self.idle.notify_all()

    def step(self, k, number, chance):
        mine = self.s[:, number]
        at = np.arange(SLOTS, dtype="u8")
        value = self.values[k]
        expected = np.uint64(value << 40 | number << 20) + at
        found = np.array(mine)
        if value and not np.array_equal(found, expected):
            with self.idle:
                self.idle.wait_for(lambda: not self.committing)
                if self.losses == self.synced[k]:
                    wrong = np.flatnonzero(found != expected)
                    raise Wrong(
                        f"slot {number}: words {wrong[:5].tolist()}... ({len(wrong)}) are "
                        f"{hexes(found[wrong])}, not those of {value}"
                    )
        self.synced[k] = self.losses
        mine[:] = np.uint64(value + 1 << 40 | number << 20) + at
        self.values[k] = value + 1
        self.hammer.did("slot changes")

    def check_end(self, S):
        for k in range(1, CREW):
            if self.losses == self.synced[k]:
                number = self.number * CREW + k
                expected = np.uint64(self.values[k] << 40 | number << 20) + np.arange(SLOTS, dtype="u8")
                if not np.array_equal(S[:, number], expected):
                    raise Wrong(f"slot {number} is {S[:5, number].tolist()}..., not those of {self.values[k]}")


# -- what the process has


def others():
    """The threads that are none of Python's."""
    return {int(task) for task in os.listdir("/proc/self/task")} - {t.native_id for t in threading.enumerate()}


def what_there_is(directory, lasting):
    """`lasting`: threads that are not Python's, and are to stay. Others are Python's and about to end."""
    gc.collect()
    close_unused()
    end = time.monotonic() + 10
    while not others() <= lasting and time.monotonic() < end:
        time.sleep(0.01)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/maps") as maps:
        mapped = [line.split(maxsplit=5)[-1].strip() for line in maps]
    with open("/proc/self/status") as status:
        rss = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(mapped),
        "files mapped": sum("zbig" in name or ".blob" in name or "(deleted)" in name for name in mapped),
        "threads": len(os.listdir("/proc/self/task")),
        "kilobytes": rss,
        "scratch files": sum(name.startswith(SCRATCH) for _, _, names in os.walk(directory) for name in names),
    }


def hammer(address, threads, seconds, seed, must=frozenset(), patience=0.0):
    """One run, from opening the database to closing it. Returns what was done."""
    databases = [dz.open(address)]
    if "://" in address:
        databases.append(dz.open(address))  # another client of the server
    for db in databases:
        db.setPoolSize(threads)  # or it warns
    try:
        it = Hammer(databases, threads, seed)
        it.create()
        it.run(seconds, must, patience)
        if it.errors:
            sys.exit("\n".join(it.errors[:5]))
        it.check_all()
        return dict(it.done)
    finally:
        for db in databases:
            db.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default=".", help="where to look for scratch files")
    parser.add_argument("--hang", type=float, default=120, help="seconds more after which it must have hung")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.seconds + WARM_UP + args.hang, exit=True)
    lasting = others()
    hammer(args.address, args.threads, WARM_UP, args.seed)
    before = what_there_is(args.directory, lasting)
    done = hammer(args.address, args.threads, args.seconds, args.seed + 1, MUST, args.hang / 2)
    after = what_there_is(args.directory, lasting)
    print(json.dumps({"done": done, "not done": sorted(MUST - done.keys()), "before": before, "after": after}))


if __name__ == "__main__":
    main()
