"""How much of the Earth between 30 and 60 degrees north is land?

Shows the heart of dask_zbig in one page: an array stored by a transaction, computed on by a cluster, and results
that the cluster saves atomically. It is `dask-zbig demo` without its checks, on a sixth of the data. Takes some
seconds and 0.2 GB of disk; run it so:

    pip install 'dask_zbig[demo]'
    python examples/land_mask.py
"""

import importlib.util
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import transaction
from distributed import Client, LocalCluster

import dask_zbig as dz

FIRST, ROWS, COLUMNS = 3600, 3600, 43200  # of the mask: 1/120 degree each, from 60 to 30 degrees north


def mask_pieces(rows):
    """The mask, True where there is water, from its compressed file, some rows at a time."""
    package = Path(importlib.util.find_spec("global_land_mask").origin).parent  # importing it would load it all
    with zipfile.ZipFile(package / "globe_combined_mask_compressed.npz").open("mask.npy") as stream:
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        stream.seek(FIRST * COLUMNS, 1)
        for first in range(0, ROWS, rows):
            yield slice(first, first + rows), np.frombuffer(stream.read(rows * COLUMNS), bool).reshape(rows, -1)


def land_by_cell(water):
    """The fraction of land in cells of 30 x 30, for one block of the mask."""
    return (~water).reshape(len(water) // 30, 30, -1, 30).mean(axis=(1, 3), dtype="f4")


def compute(uri):
    db = dz.open(uri)
    connection = db.open()
    root = connection.root()

    # A stored array is used like an ndarray. One transaction may write more than fits in memory.
    root["mask"] = mask = dz.ZBigArray((ROWS, COLUMNS), bool)
    root["map"] = dz.ZBigArray((ROWS // 30, COLUMNS // 30), "f4")
    root["by_row"] = dz.ZBigArray(ROWS, "f8")
    for rows, piece in mask_pieces(600):
        mask[rows] = piece
    transaction.commit()

    # As a Dask array it is read by the workers, all of them at the snapshot that we see now.
    water = dz.from_zbigarray(mask, chunks=(600, -1))
    by_row = (~water).mean(axis=1)
    weights = np.cos(np.radians(60 - np.arange(ROWS) / 120))
    fraction = (by_row * weights).sum() / weights.sum()
    print(f"land between 30 and 60 degrees north: {fraction.compute():.1%}")

    # The workers write both arrays, in one atomic save: both are there afterwards, or neither.
    with dz.CommitCoordinator(connection) as save:
        save.store(by_row, root["by_row"])
        save.store(water.map_blocks(land_by_cell, dtype="f4", chunks=(20, COLUMNS // 30)), root["map"])
    print(f"saved {save.result.bytes:,} bytes in transaction {save.result.tid.hex()}")

    connection.close()
    db.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        # A server process has the database; workers and we are its clients, and map its files.
        with (
            dz.serve(directory + "/earth.fs") as uri,
            LocalCluster(n_workers=2, threads_per_worker=1, local_directory=directory) as cluster,
            Client(cluster),
        ):
            compute(uri)

        # Later, without a server: the same data, opened by this process alone.
        db = dz.open(directory + "/earth.fs")
        with db.transaction() as connection:
            land = connection.root()["map"]
            print(f"{land}, at Paris {land[44, 729]:.2f}, in the Channel {land[39, 716]:.2f}")
        db.close()
