"""A cluster writes three arrays; other clients see all of it at once, or nothing.

Shows: ``CommitCoordinator`` with `store`, a region, and `append`; a task that fails half-way leaves no trace; a
reader that looks while the workers write sees the old state.

Run: python examples/atomic_save.py
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import dask.array as da
import numpy as np
import transaction
from distributed import Client, LocalCluster

import dask_zbig as dz

N = 4000


def fails(block: Any) -> Any:
    raise ZeroDivisionError("in the middle of the work")


def totals(uri: str) -> list[float]:
    """What another client sees."""
    db = dz.open(uri)
    with db.transaction() as connection:
        seen = [float(connection.root()[name][:].sum()) for name in ("squares", "halves", "log")]
    db.close()
    return seen


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        dz.serve(os.path.join(directory, "x.fs")) as uri,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster),
    ):
        db = dz.open(uri)
        connection = db.open()
        root = connection.root()
        root["squares"] = dz.ZBigArray((N, N), "f8")
        root["halves"] = dz.ZBigArray((N, N), "f4")
        root["log"] = dz.ZBigArray((0, 2), "i8")
        transaction.commit()

        x = da.arange(N, chunks=500, dtype="f8")[:, None] * da.ones((1, N), chunks=1000)
        try:
            with dz.CommitCoordinator(connection) as save:
                save.store(x**2, root["squares"])
                save.store(x.map_blocks(fails, dtype="f8", meta=np.empty((0, 0))), root["halves"])
        except ZeroDivisionError as error:
            print(f"a task failed ({error}); others see {totals(uri)}")
            assert totals(uri) == [0, 0, 0]

        with dz.CommitCoordinator(connection) as save:
            save.store(x**2, root["squares"])
            save.store(x[: N // 2] / 2, root["halves"], region=np.s_[: N // 2])
            save.append(da.from_array(np.array([[1, N]])), root["log"])
            print(f"before the commit others see {totals(uri)}")
            assert totals(uri) == [0, 0, 0]

        result = save.result
        assert result is not None
        seen = totals(uri)
        print(f"then, all at once: {seen}")
        print(f"{result.bytes / 2**20:.0f} MiB in {result.segments} segments, {result.seconds:.2f} s")
        assert seen[0] == N * float((np.arange(N) ** 2.0).sum())
        assert seen[2] == 1 + N
        connection.close()
        db.close()


if __name__ == "__main__":
    main()
