"""Joining small segments is a favour that a commit does: it costs nobody a commit, a download or a file."""

from __future__ import annotations

import errno
import gc
import glob
import logging
import os

import dask
import numpy as np
import pytest
import transaction

import dask_zbig as dz
from dask_zbig.storage.compaction import BLOBS

from tests.scratch import left  # isort: skip

PIECE = 20_000
APART = 4 << 20  # in blocks of their own: who writes to one needs all of it


def connected(db):
    return db.open(transaction.TransactionManager())


def put(connection, k, size=PIECE):
    """A blob of its own."""
    connection.root()["A"][k * APART : k * APART + size] = k + 1
    connection.transaction_manager.commit()


def make(db, count, size=PIECE):
    connection = connected(db)
    connection.root()["A"] = dz.ZBigArray(BLOBS * APART, "u1")
    connection.transaction_manager.commit()
    for k in range(count):
        put(connection, k, size)
    connection.close()


def blobs_of(directory):
    return sorted(glob.glob(os.path.join(directory, "**", "*.blob"), recursive=True))


@pytest.fixture(autouse=True)
def small_blobs():
    with dask.config.set({"zbig.inline-limit": 1024}):
        yield


# guard: flush.py `_compact`, except LoadError; without it -> the commit is refused
def test_a_damaged_blob_stops_nobody_from_changing_others(tmp_path, caplog):
    path = str(tmp_path / "x.fs")
    db = dz.open(path)
    make(db, BLOBS - 1)
    db.close()
    os.unlink(blobs_of(path + ".blobs")[0])
    db = dz.open(path)
    connection = connected(db)
    with caplog.at_level(logging.WARNING, "dask_zbig"):
        put(connection, BLOBS - 1)
    assert "not joined" in caplog.text
    connection.close()
    gc.collect()
    assert left(path + ".blobs/tmp") == []
    other = connected(db)
    A = other.root()["A"]
    for k in range(1, BLOBS):
        assert (A[k * APART : k * APART + PIECE] == k + 1).all()
    with pytest.raises(dz.LoadError):
        A.prefetch(np.s_[:PIECE])
    other.transaction_manager.abort()
    other.close()
    db.close()


# guard: compaction.py `to_join`, `local`; without it -> seven downloads
def test_nothing_is_downloaded_to_be_joined(tmp_path):
    with dz.serve(str(tmp_path / "x.fs"), shared_blob_dir=False) as uri:
        db = dz.open(uri)
        make(db, BLOBS - 1)
        db.close()
        cache = str(tmp_path / "other")
        os.mkdir(cache)
        with dask.config.set({"zbig.scratch-directory": cache}):
            db = dz.open(uri)
            connection = connected(db)
            put(connection, BLOBS - 1)
            fetched = blobs_of(cache)
            assert len(fetched) <= 1, fetched  # (what it has sent, it may keep)
            assert (connection.root()["A"][:PIECE] == 1).all()
            connection.transaction_manager.abort()
            assert blobs_of(cache)  # (or we have looked in the wrong place)
            connection.close()
            db.close()


# guard: segmentwriter.py `store_packed`; without it -> the joined file stays in the scratch directory
def test_a_join_that_does_not_fit_leaves_no_file(tmp_path, tiny_disk, caplog):
    caplog.set_level(logging.CRITICAL + 1, "txn")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    size = 750_000
    with dask.config.set({"zbig.scratch-directory": str(scratch)}):
        db = dz.open(os.path.join(tiny_disk, "x.fs"))
        make(db, BLOBS - 1, size)
        connection = connected(db)
        last = db.lastTransaction()
        with pytest.raises(OSError, match="space") as error:
            put(connection, BLOBS - 1, size)
        assert error.value.errno == errno.ENOSPC
        connection.transaction_manager.abort()
        assert db.lastTransaction() == last
        assert left(scratch) == []  # though `error` holds the frames
        assert connection.root()["A"][:].sum(dtype="u8") == size * sum(range(1, BLOBS))
        connection.close()
        db.close()
