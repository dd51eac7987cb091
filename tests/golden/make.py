"""Made the golden databases: ``python tests/golden/make.py NAME`` (which refuses to do it again).

They are a promise: every later version opens, checks, reads and writes them. v1 has leaves of version 1, v2 of version
2. A new format gets another one beside them.
"""

from __future__ import annotations

import os
import sys

import dask
import numpy as np
import transaction
from persistent.mapping import PersistentMapping

sys.path.insert(0, os.path.dirname(__file__))

import values

import dask_zbig as dz
from dask_zbig import database
from dask_zbig.cluster.staging import begin_job, commit_entry
from dask_zbig.segmentwriter import store_inline

DIRECTORY = os.path.dirname(os.path.abspath(__file__))


def assign(root, name, array, order="C"):
    root[name] = A = dz.ZBigArray(array.shape, array.dtype, order)
    A[...] = array


def fill(root, commit):
    arrays = values.values()
    pieces = {name: arrays.pop(name) for name in ("joined", "joined-blob", "shrunk", "blob", "scalar")}
    group = root["group"] = PersistentMapping()
    for name, array in arrays.items():
        assign(root, name, array, "F" if name == "f" else "C")
    root["c"].units, root["c"].notes = "m/s", {"by": ["a", 1]}
    assign(group, "scalar", pieces["scalar"])
    group["corner"] = dz.ArrayRef(root["c"][3, 1::2])
    commit()
    with dask.config.set({"zbig.inline-limit": 1024}):
        root["blob"] = B = dz.ZBigArray((4, 5000), "<u2")
        B[0] = pieces["blob"][0]
        B[2, 1000:] = pieces["blob"][2, 1000:]
        commit()
    for name, step in (("joined", 16), ("joined-blob", 1024)):
        root[name] = A = dz.ZBigArray(0, pieces[name].dtype)
        commit()
        for lo in range(0, len(pieces[name]), step):
            A.append(pieces[name][lo : lo + step])
            commit()
    root["shrunk"] = S = dz.ZBigArray(0, "<i2")
    S.append(np.arange(1, 200, dtype="<i2"))
    commit()
    S.resize(100)
    commit()
    S.resize(150)
    S.append(np.arange(3, dtype="<i2"))
    commit()
    root["tera"] = T = dz.ZBigArray(values.TERABYTE, "u1")
    for position, value in values.TERA.items():
        T[position] = value
    root["c"]._file.journal.add(values.JOB)
    commit()


def main(name):
    path = os.path.join(DIRECTORY, f"{name}.zodb")
    if os.path.exists(path):
        sys.exit(f"{path} is there, and stays as it is")
    db = dz.open(path)
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    fill(connection.root(), manager.commit)
    job = begin_job(database.location(db), connection)
    commit_entry(job, lambda own: [store_inline(None, own, b"staged, and never published")])
    manager.begin()
    connection.close()
    db.pack()
    db.close()
    for suffix in (".lock", ".tmp", ".index"):
        os.unlink(path + suffix)


if __name__ == "__main__":
    main(sys.argv[1])
