"""Datasets of xarray, stored and read back: by this process, by its engine, by a cluster."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys

import dask
import numpy as np
import pytest
import transaction
from distributed import Client, LocalCluster
from persistent.mapping import PersistentMapping

import dask_zbig as dz
from dask_zbig.errors import DTypeError, FormatError, NotStoredError, ShapeError, SnapshotError

xr = pytest.importorskip("xarray")
pd = pytest.importorskip("pandas")


pytestmark = pytest.mark.filterwarnings("error:The specified chunks")


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads"):
        yield


def weather(days=6, first="2026-01-01"):
    """A dataset with what datasets have: several dtypes, dimensions, coordinates of all kinds, attributes."""
    time = np.datetime64(first, "ns") + np.arange(days) * np.timedelta64(1, "D")
    n = np.arange(days * 4 * 3, dtype="f4").reshape(days, 4, 3)
    return xr.Dataset(
        {
            "wind": (("time", "y", "x"), n, {"units": "m/s", "valid_range": np.array([0, 100], "i2")}),
            "count": (("time",), np.arange(days, dtype="u1"), {"scale": np.float32(0.5), "flag": np.bool_(True)}),
            "height": (("y", "x"), np.arange(12).reshape(4, 3) * 1j),
            "sensor": ((), np.int16(7)),
        },
        {
            "time": ("time", time, {"long_name": "day"}),
            "x": ("x", [1.5, 2.5, 3.5]),
            "y": ("y", ["a", "bb", "ccc", "Ä"]),  # to xarray objects or pandas' strings
            "place": (("y", "x"), np.array([["Oslo", "Rome", "Bonn"]] * 4)),
            "zone": ((), np.timedelta64(3600, "s")),
            "ready": (("time",), np.zeros(days, bool)),
        },
        {"title": "test", "made": datetime.date(2026, 1, 1), "levels": [1, 2.5, "x"], "more": {"deep": (1, None)}},
    )


def as_stored(ds):
    """Text as NumPy has it: all else is to come back as it was."""
    return ds.assign_coords(y=ds["y"].astype("U3"))


def same(one, other):
    xr.testing.assert_identical(one.load(), other.load())
    for name in one.variables:
        assert one[name].dtype == other[name].dtype, name
        for key, value in one[name].attrs.items():
            assert type(value) is type(other[name].attrs[key])
    return True


@pytest.fixture
def client(clients):
    return clients.connect()


def test_it_comes_back_as_it_was(clients, client):
    ds = weather()
    group = dz.from_xarray(ds, client.root, "w")
    assert same(dz.to_xarray(group), as_stored(ds))  # also before it is committed
    client.commit()
    other = clients.connect(other=True)
    group = other.root["w"]
    assert same(dz.to_xarray(group), as_stored(ds))
    assert same(dz.to_xarray(group, chunks="auto"), as_stored(ds))
    assert dz.to_xarray(group)["wind"].dims == ("time", "y", "x")
    assert list(dz.to_xarray(group).coords) == list(ds.coords)


def test_a_view_is_the_array(local):
    client = local.connect()
    group = dz.from_xarray(weather(), client.root, "w")
    client.commit()
    ds = dz.to_xarray(group)
    assert np.shares_memory(ds["wind"].values, group["wind"][...])
    ds["wind"].loc[{"time": "2026-01-03"}] = -1
    assert (group["wind"][2] == -1).all()
    client.abort()
    assert ds["wind"].values[2, 0, 0] == 24
    ds.attrs["title"] = ds["wind"].attrs["units"] = "changed"
    ds.attrs["levels"].append("more")
    assert group.attrs()["title"] == "test"
    assert group.attrs()["levels"] == [1, 2.5, "x"]
    assert group.attrs("wind")["units"] == "m/s"


def test_chunks_by_dimension(local):
    client = local.connect()
    group = dz.from_xarray(weather(), client.root, "w")
    client.commit()
    ds = dz.to_xarray(group, chunks={"time": 4, "x": 2})
    assert ds["wind"].chunks == ((4, 2), (4,), (2, 1))
    assert dz.to_xarray(group, chunks={})["wind"].chunks == ((6,), (4,), (3,))
    with pytest.raises(TypeError, match="chunks"):
        dz.to_xarray(group, chunks=3)


def test_append(clients, client):
    group = dz.from_xarray(weather(4), client.root, "w")
    client.commit()
    more = weather(3, "2026-01-05")
    assert dz.from_xarray(more.chunk({"time": 2}), client.root, "w", append_dim="time") is group
    client.commit()
    dz.from_xarray(weather(1, "2026-01-08"), client.root, "w", append_dim="time")  # not on Dask
    client.abort()
    dz.from_xarray(weather(1, "2026-01-08"), client.root, "w", append_dim="time")
    client.commit()
    expected = xr.concat([weather(4), more, weather(1, "2026-01-08")], "time", data_vars="minimal")
    other = clients.connect(other=True)
    assert same(dz.to_xarray(other.root["w"]), as_stored(expected))
    assert other.root["w"].sizes() == {"time": 8, "y": 4, "x": 3}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda ds: ds.drop_vars("wind"), ShapeError),
        (lambda ds: ds.assign(new=ds["count"]), ShapeError),
        (lambda ds: ds.transpose("y", "x", "time"), ShapeError),
        (lambda ds: ds.isel(x=[0, 1]), ShapeError),
        (lambda ds: ds.assign(count=ds["count"] + 0.5), DTypeError),
    ],
)
@pytest.mark.parametrize("chunks", [None, {"time": 1}])
def test_what_cannot_be_appended_changes_nothing(local, change, error, chunks):
    client = local.connect()
    group = dz.from_xarray(weather(4), client.root, "w")
    client.commit()
    ds = change(weather(2))
    with pytest.raises(error):
        dz.from_xarray(ds if chunks is None else ds.chunk(chunks), client.root, "w", append_dim="time")
    client.commit()
    assert same(dz.to_xarray(group), as_stored(weather(4)))
    with pytest.raises(ShapeError, match="no 'place'"):
        dz.from_xarray(ds, client.root, "w", append_dim="place")
    with pytest.raises(NotStoredError):
        dz.from_xarray(ds, client.root, "other", append_dim="time")


def test_longer_text_is_not_cut(local):
    client = local.connect()
    ds = xr.Dataset({"name": ("t", np.array(["a", "bc"]))})
    group = dz.from_xarray(ds, client.root, "w")
    with pytest.raises(DTypeError, match="name"):
        dz.from_xarray(xr.Dataset({"name": ("t", ["long"])}), client.root, "w", append_dim="t")
    dz.from_xarray(xr.Dataset({"name": ("t", ["x"])}), client.root, "w", append_dim="t")
    assert group["name"].tolist() == ["a", "bc", "x"]


@pytest.mark.parametrize(
    ("ds", "says"),
    [
        (xr.Dataset({"a": ("x", np.array([1, "b"], object))}), "not all text"),
        (xr.Dataset({"a": ("x", np.array(["b", None], object))}), "not all text"),
        (xr.Dataset({"a": ("x", [1])}, attrs={"f": print}), "'f' of the dataset"),
        (xr.Dataset({"a": ("x", [1], {"f": [{1: object()}]})}), "'f' of 'a'"),
        (xr.Dataset({"a": ("x", [1], {"f": np.array([None])})}), "objects"),
        (xr.Dataset({("a", 1): ("x", [1])}), "str"),
        (xr.Dataset({"a": ("x", np.array(["b"], object))}).chunk(), "astype"),
        (xr.Dataset({"a": (("x", "y"), [[1, 2]])}).stack(z=("x", "y")), "MultiIndex"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_changes_nothing(local, ds, says):
    client = local.connect()
    with pytest.raises(DTypeError, match=says):
        dz.from_xarray(ds, client.root, "w")
    assert "w" not in client.root


def test_text_dates_and_odd_shapes(local):
    client = local.connect()
    ds = xr.Dataset(
        {
            "bytes": ("x", np.array([b"a", b"bcd"], object)),
            "empty": (("z", "x"), np.zeros((0, 2), "M8[s]")),
            "none": ("z", np.array([], object)),
            "big": ("x", np.arange(2, dtype=">i4")),
            "text": ("x", np.array(["é", "日本"], np.dtypes.StringDType())),
        }
    )
    back = dz.to_xarray(dz.from_xarray(ds, client.root, "w"))
    assert {name: back[name].dtype.str for name in back} == {
        "bytes": "|S3", "empty": "<M8[s]", "none": "<U1", "big": ">i4", "text": "<U2",
    }  # fmt: skip
    assert back["text"].values.tolist() == ["é", "日本"]
    client.commit()


def test_data_arrays(local):
    root = local.connect().root
    group = dz.from_xarray(weather()["wind"], root, "w")
    assert set(group) == {"wind", "time", "x", "y", "place", "zone", "ready"} - {"sensor"}
    with pytest.raises(DTypeError, match="name"):
        dz.from_xarray(xr.DataArray([1]), root, "v")
    with pytest.raises(TypeError, match="Dataset"):
        dz.from_xarray(np.ones(1), root, "v")


def test_what_another_file_has_is_taken_in_pieces(local, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    from dask_zbig.ecosystem import xarray as module

    ds = weather(50)[["wind", "count"]].drop_vars(["y", "place", "zone", "ready"])
    ds["count"] = ds["count"].astype("i2")
    ds.drop_attrs(deep=True).to_netcdf(tmp_path / "x.nc", engine="scipy")
    monkeypatch.setattr(module, "PIECE", 1000)
    client = local.connect()
    with xr.open_dataset(tmp_path / "x.nc", engine="scipy") as opened:
        group = dz.from_xarray(opened, client.root, "w")
        assert not opened["wind"].variable._in_memory  # it was read by parts
        dz.from_xarray(opened, client.root, "w", append_dim="time")
    client.commit()
    assert group["wind"].shape == (100, 4, 3)
    assert np.array_equal(group["wind"][:50], ds["wind"])
    assert np.array_equal(group["wind"][50:], ds["wind"])


def test_a_file_that_cannot_be_read_leaves_the_array_as_it_was(local, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    from dask_zbig.ecosystem import xarray as module

    ds = xr.Dataset({"n": ("time", np.arange(10)), "a": ("time", np.zeros(10)), "m": ("time", np.arange(10))})
    ds.to_netcdf(tmp_path / "x.nc", engine="scipy")
    monkeypatch.setattr(module, "PIECE", 16)
    client = local.connect()
    group = dz.from_xarray(ds, client.root, "w")
    client.commit()
    with xr.open_dataset(tmp_path / "x.nc", engine="scipy") as opened:
        mixed = opened.assign(n=opened["n"].chunk(time=5))  # what workers write is there before that
        pieces = module._Slow.pieces

        def breaks(slow):
            yield next(pieces(slow))
            raise OSError("the file is damaged")

        monkeypatch.setattr(module._Slow, "pieces", breaks)
        with pytest.raises(OSError, match="damaged"):
            dz.from_xarray(mixed, client.root, "w", append_dim="time")
    client.commit()
    assert same(dz.to_xarray(group), ds.astype({name: group[name].dtype for name in group}))


# -- the engine


def test_the_engine_reads_the_file_beside_its_writer(tmp_path):
    path = str(tmp_path / "x.fs")
    db = dz.open(path)
    connection = db.open()
    connection.root()["deep"] = {}
    dz.from_xarray(weather(), connection.root(), "w")
    transaction.commit()
    first = xr.open_dataset(path, engine="zbig", group="w")
    assert same(first, as_stored(weather()))
    connection.close()
    db.close()

    ds = xr.open_dataset(path, engine="zbig", group="w", drop_variables=["height"])
    assert "height" not in ds
    db = dz.open(path)  # it is not locked
    connection = db.open()
    dz.from_xarray(weather(2), connection.root(), "w")
    transaction.commit()
    assert ds["wind"][:, 1:3, [0, 2]].shape == (6, 2, 2)  # it still has its snapshot
    assert float(ds["wind"][5, 3, 2]) == 71
    ds.close()
    assert xr.open_dataset("file://" + path, engine="zbig", group="w").sizes["time"] == 2
    connection.close()
    db.close()
    new = xr.open_dataset(path, engine="zbig", group="w")  # nor is it what another reader has seen
    assert new.sizes["time"] == 2
    new.close()


def test_outer_and_vectorized_indexes(local):
    client = local.connect()
    group = dz.from_xarray(weather(), client.root, "w")
    client.commit()
    lazy = dz.to_xarray(group, at=local.db.lastTransaction())["wind"]
    assert not lazy.variable._in_memory
    wind = weather()["wind"].values
    assert np.array_equal(lazy[[4, 1], :, [2, 0]], wind[[4, 1]][:, :, [2, 0]])
    assert np.array_equal(lazy[3, [3, 0], [2, 0, 1]], wind[3][[3, 0]][:, [2, 0, 1]])
    assert np.array_equal(lazy[::-2, 1, [True, False, True]], wind[::-2, 1][:, [0, 2]])
    at = xr.DataArray([0, 2], dims="p")
    assert np.array_equal(lazy[at, at, at], wind[[0, 2], [0, 2], [0, 2]])
    assert lazy[-1, -1, -1] == 71


def test_the_past(local):
    client = local.connect()
    group = dz.from_xarray(weather(2), client.root, "w")
    client.commit()
    then = local.db.lastTransaction()
    dz.from_xarray(weather(1, "2026-01-03"), client.root, "w", append_dim="time")
    client.commit()
    assert same(dz.to_xarray(group, at=then), as_stored(weather(2)))
    assert dz.to_xarray(group, at=then, chunks={"time": 1})["wind"].chunks[0] == (1, 1)
    path = client.connection.db().storage._file_name
    assert xr.open_dataset(path, engine="zbig", group="w", at=then).sizes["time"] == 2
    assert xr.open_dataset(path, engine="zbig", group="w").sizes["time"] == 3
    later = dz.from_xarray(weather(2), client.root, "new")
    with pytest.raises(NotStoredError):
        dz.to_xarray(later, at=then)
    client.commit()
    with pytest.raises(SnapshotError, match="dataset"):
        dz.to_xarray(later, at=then)


def test_chunks_of_two_snapshots_have_different_names(zeo_server):
    db = dz.open(zeo_server)
    connection = db.open()
    dz.from_xarray(weather(), connection.root(), "w")
    transaction.commit()
    before = xr.open_dataset(zeo_server, engine="zbig", group="w", chunks={})
    connection.root()["w"]["wind"][:] = 1
    transaction.commit()
    after = xr.open_dataset(zeo_server, engine="zbig", group="w", chunks={"time": 2})
    again = xr.open_dataset(zeo_server, engine="zbig", group="w", chunks={})
    assert before["wind"].data.name != again["wind"].data.name
    assert after["wind"].chunks == ((2, 2, 2), (4,), (3,))
    assert dask.compute(before["wind"].sum(), again["wind"].sum()) == (71 * 36, 72)
    assert after["wind"].isel(y=1).chunk({"x": 1}).sum() == 18
    part = xr.open_dataset(zeo_server, engine="zbig", group="w")["wind"].isel(time=slice(1, 3)).chunk({"time": 1})
    assert part.shape == (2, 4, 3)
    assert part.sum() == 24
    connection.close()
    db.close()


def test_preferred_chunks_are_those_of_from_zbigarray(local):
    client = local.connect()
    ds = xr.Dataset({"a": (("t", "x"), np.zeros((64, 1 << 16)))})
    group = dz.from_xarray(ds, client.root, "w")
    client.commit()
    with dask.config.set({"array.chunk-size": "8 MiB"}):
        lazy = xr.open_dataset(client.connection.db().storage._file_name, engine="zbig", group="w", chunks={})
        assert lazy["a"].chunks == dz.from_zbigarray(group["a"]).chunks == ((16,) * 4, (1 << 16,))


def test_errors_of_the_engine(local, tmp_path):
    client = local.connect()
    client.root["sub"] = sub = PersistentMapping()
    dz.from_xarray(weather(), sub, "w")
    client.commit()
    path = client.connection.db().storage._file_name
    assert xr.open_dataset(path, engine="zbig", group="/sub/w/").sizes["time"] == 6
    with pytest.raises(NotStoredError, match="datasets there: 'w'"):
        xr.open_dataset(path, engine="zbig", group="sub/v")
    with pytest.raises(NotStoredError, match="is no dataset"):
        xr.open_dataset(path, engine="zbig", group="sub/w/wind")
    with pytest.raises(dz.DatabaseUnavailableError, match="no FileStorage"):
        xr.open_dataset(str(tmp_path / "none.fs"), engine="zbig", group="w")
    assert not os.path.exists(tmp_path / "none.fs")


# -- a cluster


def test_a_cluster_saves_a_dataset_at_once(tmp_path):
    with (
        dz.serve(str(tmp_path / "x.fs")) as uri,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)) as c,
        Client(c),
        dask.config.set(scheduler=None),
    ):
        db = dz.open(uri)
        connection = db.open()
        ds = weather().chunk({"time": 2})
        group = dz.from_xarray(ds, connection.root(), "w")
        with db.transaction() as other:
            assert "w" not in other.root()
        transaction.commit()
        opened = xr.open_dataset(uri, engine="zbig", group="w", chunks={"time": 2})
        assert same(opened, as_stored(weather()))
        result = opened[["wind"]].mean("time").compute()
        assert np.allclose(result["wind"], weather()["wind"].mean("time"))

        dz.from_xarray((opened[["wind"]] * 2).drop_vars("place"), connection.root(), "w2")
        dz.from_xarray(ds, connection.root(), "w", append_dim="time")
        transaction.abort()
        assert "w2" not in connection.root()
        assert group["wind"].shape[0] == 6

        broken = ds["count"].data.map_blocks(lambda block: [][1], dtype="u1", meta=np.empty(0, "u1"))
        fails = ds.assign(count=("time", broken))
        with pytest.raises(IndexError):
            dz.from_xarray(fails, connection.root(), "w3")
        transaction.commit()
        assert "w3" not in connection.root()
        connection.close()
        db.close()


# -- the group


def test_a_group_is_a_mapping(local):
    client = local.connect()
    client.root["g"] = group = dz.ArrayGroup({"a": 1})
    A = dz.ZBigArray((3, 2))
    group.add("A", A, ("t", "x"))
    client.commit()
    with pytest.raises(ShapeError, match="'t' has length 4"):
        group.add("B", dz.ZBigArray(4), ("t",))
    for dims in (("t",), ("t", "t"), ("t", 1)):
        with pytest.raises(ShapeError, match="names for"):
            group.add("B", dz.ZBigArray((3, 2)), dims)
    with pytest.raises(DTypeError):
        group.add("B", np.ones(3), ("t",))
    with pytest.raises(ShapeError, match="use add"):
        group["B"] = dz.ZBigArray(3)
    assert not group._p_changed
    group["A"] = B = dz.ZBigArray((5, 2), "i1")
    assert group["A"] is B
    assert group.sizes() == {"t": 5, "x": 2}
    group.set_attrs({"b": np.float32(2)}, "A")
    group.set_attrs({})
    client.commit()
    other = local.connect()
    assert other.root["g"].attrs("A") == {"b": 2}
    assert other.root["g"].attrs() == {}
    assert list(other.root["g"]) == ["A"]
    assert group != dz.ArrayGroup()
    del group["A"]
    client.commit()
    other.begin()
    assert len(other.root["g"]) == 0
    assert repr(other.root["g"]) == "<ArrayGroup () >"


def test_a_damaged_group_is_a_format_error():
    group = dz.ArrayGroup.__new__(dz.ArrayGroup)
    for state in ((2, {}, {}), (1, {}), (1, [], {}), (1, {}, {"a": 1}), (1, {}, {1: (1, 2, 3, 4)}), {"data": {}}):
        with pytest.raises(FormatError):
            group.__setstate__(state)


def test_without_xarray(tmp_path):
    code = (
        "import sys; sys.modules['xarray'] = None\n"
        "from dask_zbig import *\n"
        "import dask_zbig as dz\n"
        "try: dz.to_xarray(dz.ArrayGroup())\n"
        "except ImportError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "pip install 'dask_zbig[xarray]'" in done.stdout
