"""Objects and arrays of one database change together, or not at all.

Shows: a small catalogue: a persistent class, a BTree as an index, an array of measurements for each entry; a
transaction that fails half-way; a savepoint; a reference to a part of an array. The data are sea surface temperatures
of the El Niño region, 1950 to 2010, which statsmodels ships.

Run: pip install 'dask_zbig[examples]'; python examples/catalogue.py [--file FILE]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import numpy as np
import transaction
from BTrees.OOBTree import OOBTree
from persistent import Persistent

import dask_zbig as dz

try:
    from statsmodels.datasets import elnino
except ImportError:
    print("this example needs statsmodels: pip install 'dask_zbig[examples]'")
    raise SystemExit(0) from None


class Entry(Persistent):
    """What the catalogue knows of one series. (A real program has this in a module of its own.)"""

    def __init__(self, name: str, units: str, values: np.ndarray) -> None:
        self.name = name
        self.units = units
        self.values = dz.ZBigArray(values.shape, values.dtype)
        self.values[:] = values
        self.warmest: Any = None
        self.update()

    def update(self) -> None:
        """What follows from the values: kept here, so that nobody has to read them."""
        self.mean = float(self.values[:].mean())
        year = int(self.values[:].mean(axis=1).argmax())
        self.warmest = dz.ArrayRef(self.values[year])  # a part of the array, by reference


def add(catalogue: Any, name: str, values: np.ndarray) -> None:
    catalogue["entries"][name] = entry = Entry(name, "degrees C", values)
    catalogue["by mean"][entry.mean] = entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="a new database to keep; else a temporary one")
    path = parser.parse_args().file
    data = elnino.load_pandas().data.to_numpy()[:, 1:]  # 61 years, 12 months
    with tempfile.TemporaryDirectory() as directory:
        db = dz.open(path or os.path.join(directory, "x.fs"))
        connection = db.open()
        catalogue = connection.root()
        catalogue["entries"], catalogue["by mean"] = OOBTree(), OOBTree()
        add(catalogue, "all", data)
        transaction.commit()

        # Half of the work is done when something goes wrong: neither objects nor arrays know of it.
        try:
            with transaction.manager:
                add(catalogue, "since 1980", data[30:])
                catalogue["entries"]["all"].values[0] = 0
                raise RuntimeError("the sensor was broken")
        except RuntimeError as error:
            print(f"{error}: entries are {list(catalogue['entries'])}")
        entry = catalogue["entries"]["all"]
        assert list(catalogue["entries"]) == ["all"]
        assert np.array_equal(entry.values[:], data)

        # A part of a transaction can be taken back.
        add(catalogue, "1950 to 1979", data[:30])
        savepoint = transaction.savepoint()
        catalogue["entries"]["1950 to 1979"].values[:] += 100
        savepoint.rollback()
        add(catalogue, "since 1980", data[30:])
        catalogue["entries"]["all"].units = "°C"
        transaction.commit()
        connection.close()

        # Another connection, as another process would have it: everything fits together.
        with db.transaction() as other:
            catalogue = other.root()
            for mean, entry in catalogue["by mean"].items():
                print(f"{entry.name:13} {entry.values.shape}  mean {mean:.2f} {entry.units}")
                assert mean == entry.values[:].mean()
            warmest = catalogue["entries"]["all"].warmest.deref()
            print(f"the warmest year, by month: {warmest}")
            assert len(catalogue["entries"]) == 3
            assert warmest.mean() == data.mean(axis=1).max()
        db.close()


if __name__ == "__main__":
    main()
