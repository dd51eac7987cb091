"""Files of blobs that are not what was stored: never mapped; in a cache fetched again, else an ordinary error."""

from __future__ import annotations

import glob
import os

import dask
import numpy as np
import pytest
import transaction

import dask_zbig as dz

SIZE = 300_000
DATA = (np.arange(SIZE) % 251 + 1).astype("u1")


def truncate(path):
    os.truncate(path, SIZE - 5000)


def empty(path):
    os.truncate(path, 0)


def lengthen(path):
    """As ZEO does, when it appends to what is left of an earlier download."""
    with open(path, "ab") as file:
        file.write(b"junk")


def flip(path):
    with open(path, "r+b") as file:
        file.seek(SIZE // 2)
        byte = file.read(1)
        file.seek(SIZE // 2)
        file.write(bytes([byte[0] ^ 4]))


def directory(path):
    os.unlink(path)
    os.mkdir(path)


def pipe(path):
    os.unlink(path)
    os.mkfifo(path)


def halve_download(path):
    """As when a client is killed while it downloads: ZEO appends to what is left of that."""
    os.rename(path, path + ".dl")
    os.truncate(path + ".dl", 5000)


def slow(*damages):
    return [pytest.param(damage, marks=pytest.mark.slow) for damage in damages]


DAMAGES = [truncate, empty, lengthen, directory, pipe, os.unlink]


def blob(directory_):
    (path,) = [p for p in glob.glob(directory_ + "/**", recursive=True) if p.endswith(".blob")]
    os.chmod(path, 0o600)
    return path


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "x.fs")
    db = dz.open(path)
    with db.transaction() as connection:
        connection.root()["A"] = A = dz.ZBigArray(SIZE, "u1")
        A[:] = DATA
    db.close()
    return path


def everything(A):
    """Every way to ask for the bytes that says at once whether they can be had."""
    return [
        lambda: A.prefetch(),
        lambda: A[SIZE - 6000],
        lambda: dz.from_zbigarray(A, chunks=100_000).sum().compute(scheduler="threads"),
    ]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_local_file(path, damage):
    damage(blob(path + ".blobs"))
    db = dz.open(path)
    connection = db.open(transaction.TransactionManager())
    with dask.config.set({"zbig.load-timeout": 0.1}):
        for use in everything(connection.root()["A"]):
            with pytest.raises(dz.LoadError, match="segment 0x") as caught:
                use()
            assert type(caught.value) in (dz.LoadError, *dz.LoadError.__subclasses__())
    connection.transaction_manager.abort()
    connection.close()
    db.close()


@pytest.mark.parametrize("damage", [lengthen, flip, directory, halve_download, *slow(truncate, empty, pipe, os.unlink)])
def test_a_copy_in_a_cache_is_fetched_again(path, tmp_path, damage):
    cache = str(tmp_path / "cache")
    with dz.serve(path, shared_blob_dir=False) as uri:
        uri = f"{uri}{'&' if '?' in uri else '?'}blob_dir={cache}"
        for spoil in (damage, lambda path: None):
            db = dz.open(uri)
            with db.transaction() as connection:
                A = connection.root()["A"]
                for use in everything(A):
                    use()
                assert np.array_equal(A[:], DATA)
            db.close()
            spoil(blob(cache))
        db = dz.open(uri)
        with db.transaction() as connection:
            np.testing.assert_array_equal(connection.root()["A"][:], DATA)
        assert dz.check(db).sound
        db.close()


def test_a_directory_that_is_not_ours_stays(path, tmp_path):
    """In the place of a copy in a cache: we do not remove what is in there."""
    cache = str(tmp_path / "cache")
    with dz.serve(path, shared_blob_dir=False) as uri:
        uri = f"{uri}{'&' if '?' in uri else '?'}blob_dir={cache}"
        db = dz.open(uri)
        with db.transaction() as connection:
            connection.root()["A"].prefetch()
        db.close()
        place = blob(cache)
        directory(place)
        with open(os.path.join(place, "precious"), "w"):
            pass
        db = dz.open(uri)
        refused = pytest.raises(dz.LoadError, match="cannot remove the damaged copy")
        with db.transaction() as connection, refused:
            connection.root()["A"].prefetch()
        db.close()
        assert os.listdir(place) == ["precious"]


@pytest.mark.parametrize("damage", [flip, *slow(truncate, lengthen, os.unlink)])
def test_a_file_that_the_server_has_damaged(path, damage):
    """It is fetched once more, for nothing."""
    damage(blob(path + ".blobs"))
    with dz.serve(path, shared_blob_dir=False) as uri:
        db = dz.open(uri)
        with db.transaction() as connection:
            A = connection.root()["A"]
            with pytest.raises(dz.LoadError, match="segment 0x"):
                A.prefetch()
            with pytest.raises(dz.LoadError, match="segment 0x"):
                dz.from_zbigarray(A, chunks=100_000).sum().compute(scheduler="threads")
        report = dz.check(db)
        assert [(d.path, d.start, d.stop) for d in report.damages] == [("A", 0, SIZE)]
        db.close()
