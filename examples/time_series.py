"""Measurements come in, one transaction a batch, while other processes read them.

Shows: `append` with a structured dtype, a server and its clients, and isolation: an array and the object beside it
change together, so a reader finds the number of rows that the station's record says, at any moment. The data are the
weekly CO2 measurements of Mauna Loa, 1958 to 2001, which statsmodels ships, over and over again.

Run: pip install 'dask_zbig[examples]'; python examples/time_series.py [--batches N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from typing import Any

import numpy as np
import transaction
from persistent.mapping import PersistentMapping

import dask_zbig as dz

try:
    from statsmodels.datasets import co2
except ImportError:
    print("this example needs statsmodels: pip install 'dask_zbig[examples]'")
    raise SystemExit(0) from None

RECORD = np.dtype([("week", "M8[D]"), ("ppm", "f4"), ("round", "u4")])


def measurements(number: int) -> np.ndarray:
    """The series, as it comes in for the n-th time."""
    series = co2.load_pandas().data["co2"].dropna()
    new = np.empty(len(series), RECORD)
    new["week"] = series.index.to_numpy()
    new["ppm"] = series.to_numpy()
    new["round"] = number
    return new


def read(uri: str, batches: int, start: Any, results: Any) -> None:
    """In a process of its own: look again and again, until all is there."""
    db = dz.open(uri)
    connection = db.open()
    seen: list[int] = []
    start.wait(timeout=60)
    while not seen or seen[-1] < batches:
        transaction.begin()  # what was committed meanwhile
        log, station = connection.root()["log"], connection.root()["station"]
        if seen and station["batches"] == seen[-1]:
            time.sleep(0.001)
            continue
        assert len(log) == station["rows"], "half of a batch"
        new = log[-station["rows in a batch"] :]  # a view, only of what is new
        assert (new["round"] == station["batches"]).all()
        assert abs(float(new["ppm"].mean(dtype="f8")) - station["mean"]) < 1e-9
        seen.append(station["batches"])
    results.put((os.getpid(), len(seen)))
    connection.close()
    db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=100)
    batches = parser.parse_args().batches
    series = measurements(1)
    with tempfile.TemporaryDirectory() as directory, dz.serve(os.path.join(directory, "x.fs")) as uri:
        db = dz.open(uri)
        connection = db.open()
        root = connection.root()
        root["log"] = log = dz.ZBigArray(0, RECORD)
        root["station"] = station = PersistentMapping()
        context = multiprocessing.get_context("spawn")  # (a forked process cannot use its parent's databases)
        started = 0.0
        start, results = context.Barrier(3), context.Queue()
        readers = [context.Process(target=read, args=(uri, batches, start, results), daemon=True) for _ in range(2)]
        for reader in readers:
            reader.start()
        for n in range(1, batches + 1):
            series["round"] = n
            log.append(series)
            station.update(
                {
                    "batches": n,
                    "rows": len(log),
                    "rows in a batch": len(series),
                    "mean": float(series["ppm"].mean(dtype="f8")),
                }
            )
            transaction.commit()
            if n == 1:
                start.wait(timeout=60)  # now they look
                started = time.perf_counter()
        rate = (batches - 1) / (time.perf_counter() - started)
        print(f"{batches} batches, {len(log):,} rows, {log.nbytes >> 10:,} KiB; {rate:.0f} commits a second")
        for _ in readers:
            pid, looks = results.get(timeout=60)
            print(f"reader {pid} saw {looks} different states, each of them whole")
        for reader in readers:
            reader.join(timeout=30)
            assert reader.exitcode == 0

        first, last = log["ppm"][0], log["ppm"][-1]
        print(f"CO2 in {series['week'][0]}: {first:.1f} ppm, in {series['week'][-1]}: {last:.1f} ppm")
        assert len(log) == batches * len(series)
        assert np.array_equal(log["ppm"].reshape(batches, -1), np.tile(series["ppm"], (batches, 1)))
        connection.close()
        db.close()


if __name__ == "__main__":
    main()
