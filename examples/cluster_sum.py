"""A cluster sums an array while somebody else changes it: every task reads the same snapshot.

Shows: a ZEO server by ``dz.serve``, a Dask cluster of two processes, ``from_zbigarray``, and that what another
client commits in the middle is seen by the next computation, not by half of this one.

Run: python examples/cluster_sum.py
"""

from __future__ import annotations

import os
import tempfile

import numpy as np
import transaction
from distributed import Client, LocalCluster

import dask_zbig as dz

ROWS, COLUMNS = 8000, 2000  # 122 MiB


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        dz.serve(os.path.join(directory, "x.fs")) as uri,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        db = dz.open(uri)
        connection = db.open()
        connection.root()["A"] = array = dz.ZBigArray((ROWS, COLUMNS), "f8")
        array[:] = np.arange(ROWS)[:, None]
        transaction.commit()

        x = dz.from_zbigarray(array, chunks=(500, COLUMNS))  # opens nothing, moves nothing
        total = x.sum()

        # Somebody else, with a connection of their own, sets half of the array to zero.
        other = db.open(transaction.TransactionManager())
        other.root()["A"][::2] = 0
        other.transaction_manager.commit()
        other.close()

        before = float(total.compute())
        transaction.begin()  # now we see what was committed
        after = float(dz.from_zbigarray(array, chunks=(500, COLUMNS)).sum().compute())

        print(f"the snapshot of {total.name!r}: {before:,.0f}")
        print(f"after the other client's commit: {after:,.0f}")
        assert before == COLUMNS * sum(range(ROWS))
        assert after == COLUMNS * sum(range(1, ROWS, 2))
        connection.close()
        db.close()


if __name__ == "__main__":
    main()
