"""kill -9 a process that commits: every acknowledged commit is there in full, no other in part."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import transaction

import dask_zbig as dz

pytestmark = pytest.mark.crash

N = 3 << 20  # elements of 1 byte; large changes become blobs, small ones inline segments

WRITER = """
import sys, numpy as np, transaction
import dask_zbig as dz
db = dz.open(sys.argv[1])
conn = db.open()
root = conn.root()
A, B = root["A"], root["B"]
a = A[:]
k = root["k"]
while True:
    k += 1
    if k % 3:
        a[k % 100 :: 1000] = k % 251
        a[0] = k % 251
    else:
        a[:] = k % 251
    B.append(np.full(100, k, "i4"))
    root["k"] = k
    root["sum"] = int(a.sum(dtype="i8"))
    transaction.commit()
    print(k, flush=True)
"""


@pytest.mark.parametrize("seed", range(8))
def test_killed_writer(tmp_path, seed):
    chance = random.Random(seed)
    path = str(tmp_path / "x.fs")
    db = dz.open(path)
    with db.transaction() as conn:
        conn.root()["A"] = dz.ZBigArray(N, "u1")
        conn.root()["B"] = dz.ZBigArray(0, "i4")
        conn.root()["k"] = conn.root()["sum"] = 0
    db.close()
    acknowledged = 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, path],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for _ in range(chance.randrange(1, 12)):
                line = process.stdout.readline()
                if not line:
                    raise AssertionError(process.stderr.read() if process.stderr else "")
                acknowledged = int(line)
            spin = chance.randrange(200_000)  # somewhere in the next commits
            while spin:
                spin -= 1
            process.kill()
            rest = process.stdout.read().split()
        acknowledged = max([acknowledged, *map(int, rest)])
        acknowledged = _check(path, acknowledged)


def _check(path, acknowledged):
    db = dz.open(path)
    conn = db.open(transaction.TransactionManager())
    try:
        root = conn.root()
        k = root["k"]
        assert k in (acknowledged, acknowledged + 1)
        a, b = root["A"][:], root["B"][:]
        assert int(a.sum(dtype="i8")) == root["sum"]
        assert a[0] == k % 251
        assert np.array_equal(b, np.repeat(np.arange(1, k + 1, dtype="i4"), 100))
        return k
    finally:
        conn.close()
        db.close()
