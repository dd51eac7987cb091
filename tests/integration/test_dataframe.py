"""`dask.dataframe` on structured arrays, and what a plain user of Dask would try."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster

import dask_zbig as dz

dd = pytest.importorskip("dask.dataframe")
pd = pytest.importorskip("pandas")

RECORD = np.dtype([("time", "M8[s]"), ("value", "f4"), ("station", "S4"), ("name", "U5"), ("ok", "?")])


def records(n, first=0):
    new = np.zeros(n, RECORD)
    new["time"] = np.datetime64("2026-01-01", "s") + np.arange(first, first + n)
    new["value"] = np.arange(first, first + n)
    new["station"] = np.array([b"A", b"BC"])[np.arange(n) % 2]
    new["name"] = "Zürich"[:5]
    new["ok"] = np.arange(n) % 3 == 0
    return new


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads"):
        yield


@pytest.fixture
def log(clients):
    client = clients.connect()
    client.root["log"] = A = dz.ZBigArray(0, RECORD)
    A.append(records(1000))
    client.commit()
    return A


def test_a_structured_array_is_a_dataframe(log):
    frame = dd.from_dask_array(dz.from_zbigarray(log, chunks=300))
    assert frame.npartitions == 4
    assert list(frame.columns) == list(RECORD.names)
    computed = frame.compute()
    assert computed["time"].dtype == "M8[s]"
    assert computed["value"].dtype == "f4"
    assert np.array_equal(computed["time"], log["time"])
    assert np.array_equal(computed["value"], log["value"])
    assert computed["ok"].sum() == 334
    assert set(computed["name"]) == {"Züric"}
    assert frame[frame.ok]["value"].sum().compute() == log["value"][log["ok"]].sum()
    assert frame.index.compute().tolist() == list(range(1000))
    assert frame.loc[298:301].compute()["value"].tolist() == [298, 299, 300, 301]


def test_grouping_by_a_column(log):
    frame = dd.from_dask_array(dz.from_zbigarray(log, chunks=128)[["station", "value"]])
    sums = frame.groupby("station")["value"].sum().compute()
    value = log["value"].astype("f8")
    assert sorted(sums.tolist()) == [value[::2].sum(), value[1::2].sum()]


def test_a_frame_reads_one_snapshot(clients, log):
    frame = dd.from_dask_array(dz.from_zbigarray(log, chunks=500))
    writer = clients.connect()
    writer.root["log"]["value"] = 0
    writer.root["log"].append(records(10))
    writer.commit()
    assert len(frame) == 1000
    assert frame["value"].sum().compute() == 499500


def test_columns_of_a_plain_matrix(local):
    client = local.connect()
    client.root["M"] = M = dz.ZBigArray((50, 3), "f8")
    M[:] = np.arange(150).reshape(50, 3)
    client.commit()
    frame = dd.from_dask_array(dz.from_zbigarray(M, chunks=(20, 3)), columns=["a", "b", "c"])
    assert frame["b"].sum().compute() == M[:, 1].sum()


def test_what_a_plain_user_would_try(log):
    x = da.from_array(log, chunks=250)
    assert dd.from_dask_array(x)["value"].max().compute() == 999
    assert pd.DataFrame(log[:3])["value"].tolist() == [0, 1, 2]
    assert pd.DataFrame(np.asarray(log)).shape == (1000, 5)
    frame = dd.from_pandas(pd.DataFrame(log[:]), npartitions=2)
    assert frame["value"].min().compute() == 0


def test_a_frame_becomes_an_array(local):
    client = local.connect()
    client.root["log"] = A = dz.ZBigArray(0, RECORD)
    A.append(records(100))
    client.root["out"] = out = dz.ZBigArray((0, 2), "f4")
    client.commit()
    frame = dd.from_dask_array(dz.from_zbigarray(A, chunks=30))
    values = frame.assign(twice=frame["value"] * 2)[["value", "twice"]].to_dask_array(lengths=True)
    with dz.CommitCoordinator(client.connection) as save:
        save.append(values, out)
    assert np.array_equal(out[:, 1], A["value"] * 2)


@pytest.mark.slow
def test_on_a_cluster(tmp_path):
    with (
        dz.serve(str(tmp_path / "x.fs")) as uri,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)) as c,
        Client(c),
        dask.config.set(scheduler=None),
    ):
        db = dz.open(uri)
        with db.transaction() as connection:
            connection.root()["log"] = A = dz.ZBigArray(0, RECORD)
            A.append(records(1000))
        frame = dd.from_dask_array(dz.from_zbigarray(uri, "log", chunks=100))
        means = frame.groupby("ok")["value"].mean().compute()
        assert means[True] == np.arange(0, 1000, 3).mean()
        by_time = frame.set_index("time", sorted=True)
        assert len(by_time.loc["2026-01-01 00:00:10":"2026-01-01 00:00:19"]) == 10
        db.close()
