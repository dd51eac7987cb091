"""The commands ``import`` and ``export``, with files of all formats."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import transaction
import xxhash
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transaction._transaction import Status

import dask_zbig as dz
from dask_zbig.cli import formats, import_, transfer
from dask_zbig.cli.main import main
from dask_zbig.storage.filestorage import FileStorage
from dask_zbig.transaction import DataManager

needs_zarr = pytest.mark.skipif(importlib.util.find_spec("zarr") is None, reason="needs zarr")
needs_h5py = pytest.mark.skipif(importlib.util.find_spec("h5py") is None, reason="needs h5py")
SUFFIXES = ["npy", "raw", pytest.param("zarr", marks=needs_zarr), pytest.param("h5", marks=needs_h5py)]
STRUCTURED = np.dtype([("n", "i1"), ("x", ">f8"), ("s", "S3")], align=True)


def run(*args):
    return CliRunner().invoke(main, [*map(str, args)])


def ok(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def report(*args):
    return json.loads(ok(*args, "--json"))


def data(shape, dtype="f8", order="C", seed=0):
    """Values of all kinds, with a run of zeros, NaN and -0.0 among them."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    size = math.prod(shape)
    if dtype.names:
        flat = np.zeros(size, dtype)
        for name in dtype.names:
            flat[name] = data((size,), dtype[name], seed=seed)
    elif dtype.kind == "f":
        flat = rng.normal(size=size).astype(dtype)
        flat[::7] = np.nan
        flat[1::11] = -0.0
    else:
        flat = np.frombuffer(rng.bytes(size * 8), "u8").astype("i4" if dtype.kind in "SUMm" else "u8").astype(dtype)
    flat[size // 4 : size // 2] = np.zeros((), dtype)
    return np.asarray(flat.reshape(shape), order=order)


def put(path, array):
    """Store an array under root["A"]."""
    db = dz.open(path)
    with db.transaction() as connection:
        connection.root()["A"] = A = dz.ZBigArray(array.shape, array.dtype, order_of(array))
        A[...] = array
    db.close()


def get(path, name="A"):
    """A copy of a stored array, and its order."""
    db = dz.open(path)
    try:
        with db.transaction() as connection:
            found = connection.root()
            for key in name.split("/"):
                found = found[key]
            return np.array(found[...], order="A"), found.order
    finally:
        db.close()


def order_of(array):
    return "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def xxh128(array):
    return "xxh128:" + xxhash.xxh3_128_hexdigest(array.tobytes(order_of(array)))


@pytest.fixture
def db(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "x.fs")


# -- there and back


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_out_and_in(db, suffix, order):
    array = data((70, 50, 40), order=order)
    put(db, array)
    out = report("export", db, "A", f"A.{suffix}", "--verify")
    assert (out["shape"], out["order"], out["verified"]) == ([70, 50, 40], order, True)
    assert out["checksum"] == xxh128(array)
    raw = ["--dtype", "f8", "--shape", "70,50,40"] if suffix == "raw" else []
    back = report("import", f"A.{suffix}", db, "back", "--verify", "--order", order, *raw)
    assert back["checksum"] == out["checksum"]
    copy, kept = get(db, "back")
    assert kept == order
    assert same(copy, array)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["?", ">f8", "c16", "S5", STRUCTURED], ids=str)
def test_dtypes(db, suffix, dtype):
    array = data((30, 7), dtype)
    put(db, array)
    ok("export", db, "A", f"A.{suffix}", "--verify")
    raw = ["--dtype", str(np.dtype(dtype).descr if STRUCTURED is dtype else dtype), "--shape", "-1,7"]
    if dtype is STRUCTURED and suffix == "raw":
        return  # (whose dtype with gaps no text gives)
    ok("import", f"A.{suffix}", db, "back", "--verify", *(raw if suffix == "raw" else []))
    back, _ = get(db, "back")
    packed = [("n", "i1"), ("x", "f8"), ("s", "S3")]
    assert same(back.astype(packed), array.astype(packed)) if dtype is STRUCTURED else same(back, array)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(), (0, 4), (1, 1, 5)])
def test_shapes(db, suffix, shape):
    array = data(shape, "f4") if math.prod(shape) > 1 else np.full(shape, 7, "f4")
    put(db, array)
    ok("export", db, "A", f"A.{suffix}", "--verify")
    raw = ["--dtype", "f4", "--shape", ",".join(map(str, shape)) or "()"] if suffix == "raw" else []
    ok("import", f"A.{suffix}", db, "back", "--verify", *raw)
    assert same(get(db, "back")[0], array)


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_and_raw_are_numpys(db, order):
    array = data((30, 20), order=order)
    np.save("in.npy", array)
    ok("import", "in.npy", db, "A")
    found, kept = get(db)
    assert kept == order
    assert same(found, array)
    ok("export", db, "A", "out.npy")
    ok("export", db, "A", "out.raw")
    assert same(np.load("out.npy"), array)
    assert order_of(np.load("out.npy")) == order
    assert same(np.memmap("out.raw", "f8", "r", shape=(30, 20), order=order), array)
    with open("in.npy", "rb") as a, open("out.npy", "rb") as b:
        assert a.read() == b.read()


def test_raw_with_an_offset_and_an_unknown_length(db):
    array = data((5, 6), "i4")
    with open("x.bin", "wb") as file:
        file.write(b"header!" + array.tobytes() + b"trailer")
    layout = ["--dtype", "i4", "--offset", "7"]
    ok("import", "x.bin", db, "A", *layout, "--shape", "5x6", "--verify")
    assert same(get(db)[0], array)
    assert "7" in run("import", "x.bin", db, "B", *layout, "--shape", "-1,6").output
    os.truncate("x.bin", 7 + array.nbytes)
    ok("import", "x.bin", db, "B", *layout, "--shape", "-1,6", "--order", "F")
    assert get(db, "B")[0].shape == (5, 6)
    assert same(get(db, "B")[0], array.reshape(-1).reshape((5, 6), order="F"))
    structured = "[('a', 'i2'), ('b', 'i2')]"
    ok("import", "x.bin", db, "C", "--offset", "7", "--dtype", structured)
    assert same(get(db, "C")[0], array.view([("a", "i2"), ("b", "i2")]).reshape(-1))


@needs_zarr
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_is_zarrs(db, zarr_format):
    import zarr

    array = data((95, 61))
    group = zarr.open_group("x.zarr", mode="w", zarr_format=zarr_format)
    made = group.create_array("deep/one", shape=array.shape, chunks=(20, 13), dtype="f8", fill_value=9)
    made[:80] = array[:80]
    expected = made[:]
    for name in ("x.zarr:deep/one", "x.zarr/deep/one"):
        ok("import", name, db, "A", "--verify", "--overwrite")
        assert same(get(db)[0], expected)
    ok("export", db, "A", "x.zarr:other", "--chunks", "50,60")
    assert same(zarr.open_group("x.zarr", mode="r")["other"][:], expected)
    assert zarr.open_group("x.zarr", mode="r")["other"].chunks == (50, 60)
    assert "chunks" in run("export", db, "A", "y.zarr", "--chunks", "50").output
    assert run("export", db, "A", "x.zarr:other").exit_code == 1
    ok("export", db, "A", "x.zarr:other", "--overwrite", "--verify")
    assert zarr.open_group("x.zarr", mode="r")["other"].chunks != (50, 60)
    assert sorted(os.listdir()) == ["x.fs", "x.fs.blobs", "x.fs.index", "x.fs.lock", "x.fs.tmp", "x.zarr"]


@needs_h5py
def test_hdf5_is_hdf5s(db):
    import h5py

    array = data((95, 61))
    with h5py.File("x.h5", "w") as file:
        file["group/one"] = array
    ok("import", "x.h5", db, "A", "--verify")
    with h5py.File("x.h5", "a") as file:
        file.create_dataset("two", data=array * 2, chunks=(10, 61), compression="gzip")
        file["text"] = "no array of ours"
    result = run("import", "x.h5", db, "B")
    assert result.exit_code == 1
    assert "3 datasets (group/one, text, two): say which" in result.output
    ok("import", "x.h5:two", db, "B", "--verify")
    assert same(get(db, "B")[0], array * 2)
    assert run("import", "x.h5:text", db, "C").exit_code == 1
    assert run("import", "x.h5:group", db, "C").output.startswith("Error: x.h5:group: this is no array, but a Group")
    ok("export", db, "A", "x.h5:deep/three", "--verify", "--chunks", "7,7")
    assert run("export", db, "A", "x.h5:deep/three").exit_code == 1
    ok("export", db, "B", "x.h5:deep/three", "--overwrite")
    with h5py.File("x.h5") as file:
        assert same(file["deep/three"][:], array * 2)
        assert same(file["group/one"][:], array)
    ok("export", db, "A", "new.h5")
    ok("import", "new.h5", db, "D", "--verify")


# -- what a transfer promises


def test_holes_stay_holes(db):
    connection = (opened := dz.open(db)).open()
    connection.root()["A"] = A = dz.ZBigArray((1 << 16, 1 << 12), "u1")  # 256 MiB
    A[1 << 15, :] = 1
    transaction.commit()
    connection.close()
    opened.close()
    for name in ("A.raw", "A.npy"):
        ok("export", db, "A", name)
        assert os.path.getsize(name) >= 1 << 28
        assert os.stat(name).st_blocks * 512 < 1 << 20
    assert np.load("A.npy", mmap_mode="r")[1 << 15].sum() == 1 << 12
    with open("z.raw", "wb") as file:
        os.truncate("z.raw", 128 << 20)
        os.pwrite(file.fileno(), b"x", 80 << 20)
    ok("import", "z.raw", db, "Z", "--dtype", "u1", "--verify")
    (row,) = json.loads(ok("ls", db, "Z", "--json"))
    assert row["stored"] <= 64 << 20


def test_one_save_or_several(db):
    np.save("x.npy", data((64, 1 << 14)))  # 8 MiB
    assert report("import", "x.npy", db, "A")["transactions"] == 1
    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:
        m.setattr(transfer, "AT_ONCE", 1 << 20)
        m.setattr(transfer.boxes, "__defaults__", (1 << 20,))
        several = report("import", "x.npy", db, "B", "--transaction-size", "2MiB", "--verify")
    assert several["transactions"] == 4  # (a quarter of it is zeros; the last one names it)
    assert json.loads(ok("info", db, "B", "--json"))["transactions"][0]["note"] == "dask-zbig import of x.npy to B"
    assert [row["path"] for row in json.loads(ok("ls", db, "--json"))] == ["A", "B"]
    assert same(get(db, "B")[0], np.load("x.npy"))


@pytest.mark.parametrize("size", [None, "1MiB"])
def test_an_import_that_fails_leaves_nothing(db, monkeypatch, size):
    put(db, np.ones(3))
    np.save("x.npy", np.ones(4 << 17))
    monkeypatch.setattr(transfer.boxes, "__defaults__", (1 << 20,))
    count = itertools.count()
    read = formats.FlatFile.read

    def fail(self, box):
        if next(count) == 2:
            raise OSError(5, "Input/output error", "x.npy")
        return read(self, box)

    monkeypatch.setattr(formats.FlatFile, "read", fail)
    result = run("import", "x.npy", db, "group/B", *(["--transaction-size", size] if size else []))
    assert (result.exit_code, result.output) == (1, "Error: x.npy: Input/output error\n")
    assert [row["path"] for row in json.loads(ok("ls", db, "--json"))] == ["A"]
    left = os.listdir(os.path.join(db + ".blobs", "tmp"))
    assert [name for name in left if not name.endswith(".lock")] == []  # (that is this process's)


def interrupted_import(db, monkeypatch, array, owner, name, does, saved):
    """In four transactions. Nothing is left of it, unless all was saved: then it is said."""
    np.save("x.npy", array)
    with monkeypatch.context() as patch:
        patch.setattr(transfer.boxes, "__defaults__", (1 << 20,))
        patch.setattr(owner, name, does)
        result = run("import", "x.npy", db, "B", "--transaction-size", "1MiB")
    assert (result.exit_code, result.stderr) == (1, "B: all of it is saved\n" * saved + "\nAborted!\n")
    assert [row["path"] for row in json.loads(ok("ls", db, "--json"))] == ["A", "B"][: 1 + saved]
    if saved:
        with contextlib.closing(dz.open(db)) as opened, opened.transaction() as connection:
            assert same(connection.root()["B"][:], array)


@pytest.mark.parametrize(("nth", "saved"), [(1, False), (2, False), (4, True)])
def test_ctrl_c_in_the_last_step_of_a_commit(db, monkeypatch, nth, saved):
    put(db, np.ones(3))
    count = itertools.count(1)
    finish = FileStorage._finish_finish

    def interrupted(self, tid):
        if next(count) == nth:
            signal.raise_signal(signal.SIGINT)
        finish(self, tid)

    interrupted_import(db, monkeypatch, data((4 << 17,)), FileStorage, "_finish_finish", interrupted, saved)
    assert next(count) == (5 if saved else nth + 2)  # (one more, to forget it)


@pytest.mark.parametrize(("nth", "saved"), [(1, False), (4, True)])
def test_ctrl_c_just_after_a_commit(db, monkeypatch, nth, saved):
    put(db, np.ones(3))
    count = itertools.count(1)
    over = DataManager._over

    def interrupted(self, current):
        if current.status == Status.COMMITTED and next(count) == nth:
            signal.raise_signal(signal.SIGINT)
        over(self, current)

    interrupted_import(db, monkeypatch, data((4 << 17,)), DataManager, "_over", interrupted, saved)


def test_ctrl_c_while_an_import_is_verified(db, monkeypatch):
    np.save("x.npy", data((100,)))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_, "compare", interrupted)
        result = run("import", "x.npy", db, "B", "--verify")
    assert (result.exit_code, result.stderr) == (1, "B: all of it is saved\n\nAborted!\n")
    assert [row["path"] for row in json.loads(ok("ls", db, "--json"))] == ["B"]


def test_an_import_that_is_killed_shows_nothing_at_its_path(db, monkeypatch):
    np.save("x.npy", np.ones(4 << 17))
    monkeypatch.setattr(transfer.boxes, "__defaults__", (1 << 20,))
    monkeypatch.setattr(import_, "_forget", lambda *_: None)
    count = itertools.count()
    read = formats.FlatFile.read

    def fail(self, box):
        if next(count) == 2:
            raise OSError(5, "Input/output error", "x.npy")
        return read(self, box)

    with monkeypatch.context() as m:
        m.setattr(formats.FlatFile, "read", fail)
        assert run("import", "x.npy", db, "B", "--transaction-size", "1MiB").exit_code == 1
    assert [row["path"] for row in json.loads(ok("ls", db, "--json"))] == ["B.importing"]
    ok("import", "x.npy", db, "B", "--transaction-size", "1MiB", "--verify")  # takes its place
    assert [row["path"] for row in json.loads(ok("ls", db, "--json"))] == ["B"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_export_that_fails_leaves_what_was_there(db, monkeypatch, suffix):
    array = data((30, 20))
    put(db, array)
    name = f"A.{suffix}:one" if suffix == "h5" else f"A.{suffix}"
    ok("export", db, "A", name)
    before = sorted(os.listdir())

    def fail(*_):
        raise OSError(28, "No space left on device", name)

    monkeypatch.setattr(formats.FlatFile, "write_bytes", fail)
    monkeypatch.setattr(formats.ChunkedFile, "write", fail)
    other = f"B.{suffix}:one" if suffix == "h5" else f"B.{suffix}"
    assert run("export", db, "A", other).output == f"Error: {name}: No space left on device\n"
    if suffix != "h5":  # (which is written in place)
        result = run("export", db, "A", name, "--overwrite")
        assert (result.exit_code, result.output) == (1, f"Error: {name}: No space left on device\n")
    assert sorted(os.listdir()) == before
    monkeypatch.undo()
    os.chdir(os.path.dirname(db))
    raw = ["--dtype", "f8", "--shape", "30,20"] if suffix == "raw" else []
    ok("import", name, db, "back", "--verify", *raw)
    assert same(get(db, "back")[0], array)


def test_overwrite(db):
    np.save("x.npy", np.ones(3))
    ok("import", "x.npy", db, "g/A")
    result = run("import", "x.npy", db, "g/A")
    assert (result.exit_code, "--overwrite" in result.output) == (1, True)
    np.save("x.npy", np.zeros((2, 2), "i4"))
    ok("import", "x.npy", db, "g/A", "--overwrite")
    assert get(db, "g/A")[0].shape == (2, 2)
    ok("export", db, "g/A", "y.npy")
    mode = os.stat("x.npy").st_mode
    assert os.stat("y.npy").st_mode == mode
    assert run("export", db, "g/A", "y.npy").exit_code == 1
    os.unlink("y.npy")
    os.symlink("elsewhere", "y.npy")
    assert run("export", db, "g/A", "y.npy").exit_code == 1
    ok("export", db, "g/A", "y.npy", "--overwrite")
    assert not os.path.islink("y.npy")
    assert not os.path.exists("elsewhere")


def test_verify_finds_a_difference(db, monkeypatch):
    np.save("x.npy", data((100, 100)))
    copy_in = import_.copy_in

    def spoilt(source, array, *args):
        result = copy_in(source, array, *args)
        array[50, 3] = 12345
        return result

    monkeypatch.setattr(import_, "copy_in", spoilt)
    result = run("import", "x.npy", db, "A", "--verify")
    assert result.exit_code == 1
    assert "1 elements" in result.output
    assert "(50, 3)" in result.output
    monkeypatch.undo()
    os.chdir(os.path.dirname(db))
    put(db, data((30, 20)))
    write = formats.FlatFile.write_bytes

    def flip(self, position, part):
        part = part.copy()
        part[(4 * 20 + 5) * 8 - position + 2] ^= 1
        write(self, position, part)

    monkeypatch.setattr(formats.FlatFile, "write_bytes", flip)
    result = run("export", db, "A", "y.npy", "--verify")
    assert (result.exit_code, "(4, 5)" in result.output) == (1, True)


@needs_zarr
def test_holes_of_structured_arrays_are_zeros_in_zarr(db):
    """Zarr fills texts in them with "0", unless it is told better. (--verify saw it.)"""
    put(db, np.zeros(1000, [("x", "f8"), ("s", "S3"), ("u", "U2")]))
    ok("export", db, "A", "A.zarr", "--verify", "--chunks", "10")


@needs_zarr
def test_zarr_that_has_no_zeros_for_holes(db, monkeypatch):
    """Then they are written."""
    put(db, np.zeros(1000, [("s", "S3")]))
    new = formats._new_zarr

    def other(path, like, *args):
        made = new(path, like, *args)
        made._array = importlib.import_module("zarr").open_array(
            path, mode="w", shape=like.shape, chunks=(10,), dtype=like.dtype, fill_value=None, zarr_format=2
        )
        made.sparse = False
        return made

    monkeypatch.setattr(formats, "_new_zarr", other)
    ok("export", db, "A", "A.zarr", "--verify")


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        pytest.param("h5", "M8[s]", marks=needs_h5py),
        pytest.param("h5", "U3", marks=needs_h5py),
        pytest.param("zarr", [("t", "M8[s]"), ("v", "f4")], marks=needs_zarr),
    ],
)
def test_dtypes_that_a_format_does_not_know(db, suffix, dtype):
    put(db, np.ones(3, dtype))
    result = run("export", db, "A", f"new.{suffix}")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: new.{suffix}: this format cannot hold the dtype ")
    assert "Traceback" not in result.stderr
    assert not os.path.exists(f"new.{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk(db, tiny_disk, suffix):
    """One line that names the file that was asked for, nothing left; HDF5's library, told of it, would crash."""
    put(db, np.random.default_rng(0).normal(size=1 << 21))
    code = "from dask_zbig.cli.main import main; main()"
    args = ["export", db, "A", f"{tiny_disk}/new.{suffix}"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300, check=False)
    told = done.stderr.splitlines()[-1]  # (old numcodecs have a warning before it)
    assert (done.returncode, told) == (1, f"Error: {tiny_disk}/new.{suffix}: No space left on device")
    assert os.listdir(tiny_disk) == []


@needs_h5py
def test_no_space_for_one_more_dataset(db, tiny_disk):
    put(db, np.random.default_rng(0).normal(size=1 << 21))
    with importlib.import_module("h5py").File(f"{tiny_disk}/x.h5", "w") as file:
        file["there"] = 5
    result = run("export", db, "A", f"{tiny_disk}/x.h5:new")
    assert result.exit_code == 1
    assert "16,777,216 bytes are needed" in result.stderr
    with importlib.import_module("h5py").File(f"{tiny_disk}/x.h5") as file:
        assert list(file) == ["there"]


@pytest.mark.parametrize("missing", [[], ["tmp"], ["tmp", ".layout"]])
def test_what_may_only_be_read(db, tiny_disk, missing):
    """A database on a read-only disk is exported; nothing is exported to it, and its name is told."""
    array = data((3000,))  # (the last page is shared by data and nothing, and so composed in a file)
    put(f"{tiny_disk}/x.fs", array)
    for name in missing:  # by copies that leave out what is empty or hidden
        subprocess.run(["rm", "-r", f"{tiny_disk}/x.fs.blobs/{name}"], check=True)
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    ok("export", f"{tiny_disk}/x.fs", "A", "A.npy", "--verify")
    assert same(np.load("A.npy"), array)
    result = run("export", f"{tiny_disk}/x.fs", "A", f"{tiny_disk}/A.npy")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tiny_disk}: Read-only file system\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["import", "nope.npy", "DB", "A"], 1, "no such file"),
        (["import", "x.fs", "DB", "A"], 2, "--format"),
        (["import", "text.npy", "DB", "A"], 1, "text.npy: this is no .npy file"),
        (["import", "objects.npy", "DB", "A"], 1, "objects.npy: "),
        (["import", "cut.npy", "DB", "A"], 1, "cut.npy: "),
        (["import", "x.raw", "DB", "A"], 2, "--dtype"),
        (["import", "x.npy", "DB", "A", "--format", "npy", "--dtype", "f8"], 2, "--dtype"),
        (["import", "x.npy", "DB", "B", "--dtype", "f8"], 2, "x.npy is of format npy"),  # its header is no data
        (["import", "x.npy", "DB", "B", "--shape", "3"], 2, "x.npy is of format npy"),
        (["import", "x.raw", "DB", "B", "--dtype", "f8", "--shape", "3,x"], 2, "not like"),
        (["import", "x.raw", "DB", "B", "--dtype", "f8", "--shape", "3x"], 2, "not like"),
        (["import", "x.raw", "DB", "A", "--dtype", "nonsense"], 2, "no dtype"),
        (["import", "x.raw", "DB", "A", "--dtype", "O"], 1, "object"),
        (["import", "x.raw", "DB", "A", "--dtype", "f8", "--shape", "1000"], 1, "needs 8000"),
        (["import", "x.raw", "DB", "A", "--dtype", "f8", "--shape", "-1,-1"], 1, "more than one"),
        (["import", "x.raw", "DB", "A", "--dtype", "f8", "--shape", "a,b"], 2, "not like"),
        (["import", "x.npy", "DB", "A/B"], 1, "'A' is no mapping"),
        (["import", "x.npy", "DB", "/"], 1, "needs a name"),
        (["import", "x.npy", "zeo:///nowhere?wait_timeout=1", "A"], 1, "no ZEO server"),
        (["export", "DB", "A", "no/where/x.npy"], 1, "is no directory"),
        (["export", "DB", "A", "x.npy"], 1, "exists already"),
        (["export", "DB", "B", "y.npy"], 1, "there is 'A'"),
        (["export", "DB", "A", "y.npy", "--chunks", "2"], 2, "no chunks"),
        (["export", "DB", "A", "y.txt"], 2, "--format"),
        (["export", "nope.fs", "A", "y.npy"], 1, "no FileStorage"),
    ],
)
def test_errors_are_one_line(db, args, code, message):
    put(db, np.ones(3))
    np.save("x.npy", np.ones(3))
    np.ones(3).tofile("x.raw")
    np.save("objects.npy", np.array([object()], object), allow_pickle=True)
    np.save("cut.npy", np.ones(3000))
    os.truncate("cut.npy", 500)
    with open("text.npy", "w") as file:
        file.write("text")
    before = sorted(os.listdir())
    result = run(*[db if a == "DB" else a for a in args])
    assert result.exit_code == code, result.output
    assert message in result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.output
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(("module", "suffix", "extra"), [("zarr", "zarr", "zarr"), ("h5py", "h5", "hdf5")])
def test_a_package_that_is_not_installed(db, monkeypatch, module, suffix, extra):
    put(db, np.ones(3))
    monkeypatch.setitem(sys.modules, module, None)
    os.mkdir(f"x.{suffix}")
    for args in (["import", f"x.{suffix}", db, "B"], ["export", db, "A", f"y.{suffix}"]):
        result = run(*args)
        assert result.exit_code == 1
        assert f"pip install 'dask_zbig[{extra}]'" in result.output
        assert len(result.output.splitlines()) == 1


def test_into_a_served_database(zeo_cache_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = data((300, 1000))
    np.save("x.npy", array)
    ok("import", "x.npy", zeo_cache_server, "transfer/A", "--verify", "--overwrite")
    out = report("export", zeo_cache_server, "transfer/A", "y.npy", "--verify")
    assert out["checksum"] == xxh128(array)
    assert same(np.load("y.npy"), array)
    local = json.loads(ok("info", zeo_cache_server, "transfer/A", "--json"))["local"]
    assert local["of"] >= array.nbytes * 0.7
    assert local["blob_bytes"] == 0  # a client with a cache of its own, which is empty


# -- the boxes


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=4),
    st.sampled_from("CF"),
    st.booleans(),
    st.integers(1, 200),
)
def test_boxes(axes, order, chunked, most):
    shape = tuple(n for n, _ in axes)
    chunks = tuple(c for _, c in axes) if chunked else None
    itemsize = 2
    covered = np.zeros(shape, int)
    number = np.arange(covered.size).reshape(shape, order=order)
    done = set()
    before = 0
    for box, before in transfer.boxes(shape, itemsize, order, chunks, most):
        covered[box] += 1
        done.update(number[box].reshape(-1).tolist())
        assert before % itemsize == 0
        assert done >= set(range(before // itemsize))
        size = covered[box].size * itemsize
        unit = math.prod(min(c, n) for c, n in zip(chunks, shape, strict=True)) if chunks else 1
        assert size <= max(most, unit * itemsize)
        for s, c in zip(box, chunks or (), strict=False):
            assert s.start % c == 0
    assert np.all(covered == 1)
    assert before == covered.size * itemsize


# -- size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size(db):
    """768 MiB, in processes that have neither so much memory of their own nor so much of files mapped."""
    rng = np.random.default_rng(0)
    with open("x.raw", "wb") as file:
        for _ in range(12):
            file.write(rng.bytes(64 << 20))

    # By a small process: what counts is the most that a child has ever had, also while it was a copy of its parent.
    limited = """
import resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_DATA, (500 << 20, 500 << 20))
subprocess.run([sys.executable, "-m", "dask_zbig.cli.main", *sys.argv[1:]], check=True, stdout=sys.stderr, timeout=900)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""

    def command(*args):
        done = subprocess.run([sys.executable, "-c", limited, *args], stdout=subprocess.PIPE, text=True, check=True)
        assert int(done.stdout) < 600 << 10  # (KiB)

    command("import", "x.raw", db, "A", "--dtype", "f8", "--shape", "-1,1024", "--verify")
    command("export", db, "A", "y.npy", "--verify")
    assert np.array_equal(np.load("y.npy", mmap_mode="r").reshape(-1).view("u8"), np.memmap("x.raw", "u8", "r"))


@pytest.mark.slow
def test_interrupted(db):
    """Ctrl-C in the middle of an import in several transactions: nothing is left of it."""
    with open("x.raw", "wb") as file:
        for _ in range(6):
            file.write(os.urandom(64 << 20))
    code = "from dask_zbig.cli.main import main; main()"
    args = ["import", "x.raw", db, "A", "--dtype", "u1", "--transaction-size", "64MiB"]
    with subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not os.path.exists(db) or os.path.getsize(db) < 3000:  # one commit
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert (process.returncode, err.strip()) == (1, "Aborted!")
    assert ok("ls", db) == "no arrays\n"
    ok("import", "x.raw", db, "A", "--dtype", "u1", "--shape", "1000")
