"""A script: commit in a loop, and kill -9 whoever writes the files, at some random moment; again and again.

    python random_kills.py DIRECTORY WHOM RUNS SEED

WHOM: `writer`, a process that has the database open, or `server`, `dask-zbig serve`, whose client commits. Each commit
changes two arrays (once as a blob, once inline) and an object, which fit to each other. Prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import tempfile

import dask
import numpy as np
import scenarios
import transaction
from at_each_call import child, result_of, start, with_root

import dask_zbig as dz

SIZE = 100_000
SECONDS = 60  # for a commit

dask.config.set({"zbig.load-timeout": SECONDS})  # (`scenarios`, which fails on purpose, has no patience)


class Harness:
    def __init__(self, directory, whom):
        self.directory, self.whom = directory, whom
        self.path = os.path.join(directory, "db", "x.fs")
        self.socket = os.path.join(directory, "socket")
        self.temporary = tempfile.tempdir = os.path.join(directory, "tmp")
        os.mkdir(self.temporary)

    # -- in children

    def prepared(self):
        def fill(root):
            root["A"] = dz.ZBigArray(SIZE, "u1")
            root["B"] = dz.ZBigArray(0, "i4")
            root["k"] = root["sum"] = 0
            transaction.commit()

        db = dz.open(self.path)
        with_root(db, fill)
        db.close()

    def commits(self, where, out):
        """Commit until killed; tell of each when it is done."""
        db = dz.open(where)
        root = db.open().root()
        A, B = root["A"], root["B"]
        a, k = A[:], root["k"]
        while True:
            k += 1
            if k % 3:
                a[k % 100 :: 10_000] = k % 251
                a[0] = k % 251
            else:
                a[:] = k % 251
            B.append(np.full(10, k, "i4"))
            root["k"] = k
            root["sum"] = int(a.sum(dtype="i8"))
            transaction.commit()
            os.write(out, b"%d\n" % k)

    def serve(self, out):
        from dask_zbig.cli.main import main

        os.dup2(out, 1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        main(["serve", self.path, "--socket", self.socket], standalone_mode=False)

    def verified(self, acknowledged):
        """Everything that was acknowledged is there, one more at most, all of it; and nothing else but that."""
        db = dz.open(self.path)

        def look(root):
            k = root["k"]
            assert k in (acknowledged, acknowledged + 1), f"{k} is there, {acknowledged} was acknowledged"
            a, b = root["A"][:], root["B"][:]
            assert int(a.sum(dtype="i8")) == root["sum"], "the sum is wrong"
            assert a[0] == k % 251
            assert np.array_equal(b, np.repeat(np.arange(1, k + 1, dtype="i4"), 10)), "something is missing"
            return k

        k = with_root(db, look)
        dz.collect_garbage(db, old=0)
        db.pack()
        left = scenarios.unknown_files(os.path.dirname(self.path), db)
        db.close()
        left += scenarios.unknown_files(os.path.dirname(self.path)) + os.listdir(self.temporary)
        assert not left, f"left behind: {left}"
        return {"k": k}

    # -- the parent

    def run(self, k, chance):
        """One kill; returns the number of the last commit, and whether one was in the database but not acknowledged."""
        victims, where = [], self.path
        if self.whom == "server":
            ready, pid = spawn(self.serve)
            victims.append(pid)
            line(ready)
            os.close(ready)
            where = f"zeo://{self.socket}?blob_dir={self.path}.blobs&shared_blob_dir=true"
        told, pid = spawn(lambda out: self.commits(where, out))
        victims.append(pid)
        text = line(told)
        select.select([], [], [], chance.random() * 0.1)  # the random moment
        for pid in victims:  # the server first: its client must not tell of more
            os.kill(pid, signal.SIGKILL)
        for pid in victims:
            os.waitpid(pid, 0)
        while more := os.read(told, 65536):
            text += more
        os.close(told)
        acknowledged = int(text.split(b"\n")[-2])
        assert acknowledged > k
        result = result_of(start(lambda: self.verified(acknowledged)))
        if "error" in result:
            raise SystemExit(result["error"])
        return result["k"], result["k"] > acknowledged


def spawn(function):
    """Have a forked child do it, with a pipe to write to."""
    mine, out = os.pipe()
    pid = os.fork()
    if pid:
        os.close(out)
        return mine, pid
    os.close(mine)
    child(lambda: function(out))
    return None


def line(fd):
    """What comes, until there is a line of it."""
    text = b""
    while not text.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], SECONDS)
        more = os.read(fd, 65536) if ready else b""
        if not more:
            raise SystemExit("the child says nothing")
        text += more
    return text


def main(directory, whom, runs, seed):
    harness = Harness(directory, whom)
    made = result_of(start(harness.prepared))
    if made:
        raise SystemExit(made["error"])
    chance = random.Random(int(seed))
    k, unknown = 0, 0
    for _ in range(int(runs)):
        k, more = harness.run(k, chance)
        unknown += more
    if whom == "server" and os.path.exists(harness.socket):
        os.unlink(harness.socket)  # the next server would
    print(json.dumps({"runs": int(runs), "commits": k, "unacknowledged": unknown}))


if __name__ == "__main__":
    main(*sys.argv[1:])
