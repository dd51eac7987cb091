"""The FileStorage with durable blobs."""

from __future__ import annotations

import os
import signal
import stat
import time

import pytest
import transaction
import ZODB
from ZODB.blob import Blob

from dask_zbig.storage import filestorage


@pytest.fixture
def opened():
    """Open databases that are closed when the test ends."""
    dbs = []

    def open_(path):
        dbs.append(ZODB.DB(filestorage.FileStorage(str(path))))
        return dbs[-1]

    yield open_
    for db in dbs:
        db.close()


def put_blob(db, key, data):
    blob = Blob()
    with blob.open("w") as file:
        file.write(data)
    with db.transaction() as conn:
        conn.root()[key] = blob


def get_blob(db, key):
    with db.transaction() as conn, conn.root()[key].open("r") as file:
        return file.read()


def test_blobs_are_synced_before_the_vote(tmp_path, opened, monkeypatch):
    db = opened(tmp_path / "x.fs")
    synced = []
    monkeypatch.setattr(filestorage, "_sync", synced.append)
    put_blob(db, "b", b"blob")
    blobs = str(tmp_path / "x.fs.blobs")
    (file,) = [path for path in synced if path.endswith(".blob")]
    expected, directory = {file}, os.path.dirname(file)
    while directory != blobs:
        expected.add(directory)
        directory = os.path.dirname(directory)
    assert set(synced) == expected | {blobs}
    synced.clear()
    put_blob(db, "b2", b"blob")  # the directories above are known now
    assert len(synced) == 3


def test_failed_sync_fails_the_transaction(tmp_path, opened, monkeypatch):
    db = opened(tmp_path / "x.fs")

    def full(path):
        raise OSError(28, "no space", path)

    with monkeypatch.context() as patch:
        patch.setattr(filestorage, "_sync", full)
        with pytest.raises(OSError, match="no space"):
            put_blob(db, "b", b"blob")
    transaction.abort()
    assert not list((tmp_path / "x.fs.blobs").rglob("*.blob"))
    put_blob(db, "b", b"again")
    assert get_blob(db, "b") == b"again"


def test_ctrl_c_does_not_close_it(tmp_path, opened, monkeypatch):
    """ZODB's own closes if anything fails in the last step, for all connections of the process."""
    path = tmp_path / "x.fs"
    db = opened(path)
    put_blob(db, "a", b"before")
    sync, synced = os.fdatasync, []

    def interrupted(descriptor):
        sync(descriptor)
        synced.append(descriptor)
        if len(synced) == 2:  # the first is in the vote
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            put_blob(db, "b", b"blob")
    assert len(synced) == 2
    transaction.abort()
    assert (get_blob(db, "a"), get_blob(db, "b")) == (b"before", b"blob")
    put_blob(db, "c", b"after")
    db.close()
    db = opened(path)
    assert [get_blob(db, key) for key in "abc"] == [b"before", b"blob", b"after"]


def test_pack_keeps_mode_and_no_copies(tmp_path, opened):
    path = tmp_path / "x.fs"
    db = opened(path)
    path.chmod(0o640)
    for i in range(3):
        put_blob(db, "b", b"%d" % i)
    db.pack(time.time() + 1)
    assert get_blob(db, "b") == b"2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(list((tmp_path / "x.fs.blobs").rglob("*.blob"))) == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".old", ".pack"))]
    db.pack(time.time() + 1)  # nothing to do
    put_blob(db, "c", b"c")


def test_a_lost_data_file_does_not_take_the_blobs_with_it(tmp_path, opened):
    path = tmp_path / "x.fs"
    db = opened(path)
    put_blob(db, "b", b"blob")
    db.close()
    path.unlink()
    opened(path).close()
    assert list((tmp_path / "x.fs.blobs").rglob("*.blob"))


def test_no_oid_is_given_twice(tmp_path, opened):
    """Also if its object was packed away since, and the database opened again: clients may know that one still."""
    path = tmp_path / "x.fs"
    db = opened(path)
    put_blob(db, "b", b"first")
    with db.transaction() as conn:
        first = conn.root()["b"]._p_oid
        del conn.root()["b"]
    db.pack(time.time() + 1)
    mode = stat.S_IMODE(os.stat(str(path) + ".oid").st_mode)
    db.close()
    db = opened(path)
    put_blob(db, "b", b"second")
    with db.transaction() as conn:
        assert conn.root()["b"]._p_oid > first
    assert mode == 0o600
    assert get_blob(db, "b") == b"second"
