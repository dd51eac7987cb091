"""A dataset of xarray in a database: labelled, growing, read by a cluster.

Shows: `from_xarray` with `append_dim`, `to_xarray`, the engine "zbig" of `xarray.open_dataset`, and the past by `at=`.
The data are monthly sea surface temperatures of the El Niño region, 1950 to 2010, which statsmodels ships.

Run: pip install 'dask_zbig[examples]'; python examples/sea_temperature.py
"""

from __future__ import annotations

import os
import tempfile

import numpy as np
import transaction
from distributed import Client, LocalCluster

import dask_zbig as dz

try:
    import xarray as xr
    from statsmodels.datasets import elnino
except ImportError:
    print("this example needs xarray and statsmodels: pip install 'dask_zbig[examples]'")
    raise SystemExit(0) from None


def years(table: np.ndarray) -> xr.Dataset:
    """Some years of the table as a dataset."""
    time = np.datetime64(f"{int(table[0, 0])}-01", "M") + np.arange(12 * len(table))
    temperature = ("time", table[:, 1:].ravel(), {"units": "degrees C"})
    return xr.Dataset({"temperature": temperature}, {"time": time.astype("M8[s]")}, {"region": "Niño 1+2"})


def main() -> None:
    table = elnino.load_pandas().data.to_numpy()
    with (
        tempfile.TemporaryDirectory() as directory,
        dz.serve(os.path.join(directory, "x.fs")) as uri,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=directory) as cluster,
        Client(cluster),
    ):
        db = dz.open(uri)
        connection = db.open()
        dz.from_xarray(years(table[:40]), connection.root(), "sea")
        transaction.commit()
        then = db.lastTransaction()
        for first in range(40, len(table)):
            dz.from_xarray(years(table[first : first + 1]), connection.root(), "sea", append_dim="time")
            transaction.commit()

        # Anybody who knows the URI, with xarray alone.
        ds = xr.open_dataset(uri, engine="zbig", group="sea", chunks={"time": 120})
        print(ds)
        climate = ds["temperature"].groupby("time.month").mean().compute()
        print(f"warmest month: {int(climate.idxmax())}, {float(climate.max()):.1f} degrees")
        anomaly = ds["temperature"].groupby("time.month") - climate.chunk()
        dz.from_xarray(anomaly.rename("anomaly").drop_vars("month").chunk(time=120), connection.root(), "anomaly")
        transaction.commit()  # what the workers have written, and the coordinates, at once

        saved = dz.to_xarray(connection.root()["anomaly"])["anomaly"]
        print(f"strongest El Niño: {saved.idxmax().dt.strftime('%B %Y').item()}, {float(saved.max()):+.1f} degrees")
        before = xr.open_dataset(uri, engine="zbig", group="sea", at=then)
        print(f"the dataset ended in {before.time[-1].dt.year.item()}, and ends in {ds.time[-1].dt.year.item()} now")

        assert before.sizes["time"] == 40 * 12
        assert np.array_equal(ds["temperature"], table[:, 1:].ravel())
        expected = table[:, 1:] - table[:, 1:].mean(axis=0)
        assert np.allclose(saved, expected.ravel())
        connection.close()
        db.close()


if __name__ == "__main__":
    main()
