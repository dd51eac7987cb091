"""Locating databases from elsewhere, and snapshots; without a server of ours."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import dask.config
import pytest
import transaction
import ZODB
from ZODB.FileStorage import FileStorage as PlainFileStorage

from dask_zbig import database
from dask_zbig.errors import (
    ClosedError,
    DatabaseUnavailableError,
    ForkError,
    SnapshotError,
    ZBigError,
)


@pytest.fixture(autouse=True)
def _time_limit():
    def out_of_time(*_):
        raise TimeoutError("the test took too long")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.fixture
def opened():
    """Open databases that are closed when the test ends."""
    dbs = []

    def open_(*args, **options):
        dbs.append(database.open(*args, **options))
        return dbs[-1]

    yield open_
    for db in dbs:
        db.close()


def put(db, key, value):
    with db.transaction() as conn:
        conn.root()[key] = value
    return db.lastTransaction()


def test_location_is_small_and_picklable(tmp_path, opened):
    here = database.location(opened(tmp_path / "x.fs"))
    assert pickle.loads(pickle.dumps(here)) == here
    assert len(pickle.dumps(here)) < 300 + len(here.alias)
    assert (here.exclusive, here.uri, here.pid) == (True, None, os.getpid())
    with pytest.raises(AttributeError):
        here.alias = "other"


def test_database_finds_the_open_one(tmp_path, opened):
    db = opened(tmp_path / "x.fs")
    assert database.database(database.location(db)) is db
    plain = ZODB.DB(None)
    here = database.register(plain)
    assert database.register(plain) is here
    assert database.database(here) is plain
    plain.close()
    with pytest.raises(DatabaseUnavailableError, match="closed by this process"):
        database.database(here)
    with pytest.raises(ClosedError, match="closed"):
        database.location(plain)


def test_plain_filestorage_is_recognised(tmp_path, opened):
    plain = ZODB.DB(PlainFileStorage(str(tmp_path / "x.fs")))
    here = database.location(plain)
    assert here.alias == f"file://{tmp_path.resolve()}/x.fs"
    plain.close()
    db = opened(tmp_path / "x.fs")  # closed and opened again: the same place
    assert database.database(here) is db


def test_databases_are_held_weakly():
    db = ZODB.DB(None)
    here = database.register(db)
    del db
    gc.collect()
    with pytest.raises(DatabaseUnavailableError):
        database.database(here)


def test_exclusive_elsewhere(tmp_path):
    elsewhere = database.Location(f"file://{tmp_path}/x.fs", None, True, os.getpid() + 1)
    message = f"FileStorage '{tmp_path}/x.fs' can be opened by one process only"
    with pytest.raises(DatabaseUnavailableError, match=message) as info:
        database.database(elsewhere)
    assert f"serve it: with dz.serve('{tmp_path}/x.fs') as uri: db = dz.open(uri)" in str(info.value)


def test_configured_uri(tmp_path):
    secret = database.Location("postgres://db/x", None, False, 1)
    with pytest.raises(DatabaseUnavailableError, match=r"zbig\.database-uris"):
        database.database(secret)
    with dask.config.set({"zbig.database-uris": {secret.alias: f"{tmp_path}/x.fs"}}):
        db = database.database(secret)
    try:
        assert database.location(db).alias == secret.alias
        assert database.database(secret) is db
    finally:
        db.close()


def test_one_thread_opens_for_all(monkeypatch):
    opening, arrived = [], []

    def slowly(where, options):
        opening.append(where)
        deadline = time.monotonic() + 60
        while len(arrived) < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.2)  # until those who have arrived wait, too
        if where == "bad":
            raise DatabaseUnavailableError("bad")
        return ZODB.DB(None), where

    monkeypatch.setattr("dask_zbig.opening.open_database", slowly)
    for uri in ("good", "bad"):
        arrived.clear()
        results = []

        def ask(uri=uri, results=results):
            arrived.append(1)
            try:
                results.append(database.database(database.Location(f"test:{uri}", uri, False, 1)))
            except ZBigError as error:
                results.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 8
        assert len(set(results)) == 1
    assert opening == ["good", "bad"]


def test_fork(tmp_path, opened):
    db = opened(tmp_path / "x.fs")
    here = database.location(db)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with pytest.raises(ForkError, match="open it again"):
                database.location(db)
            with pytest.raises(DatabaseUnavailableError, match="one process only"):
                database.database(here)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert database.database(here) is db


def test_import_opens_nothing():
    code = "import sys; from dask_zbig import config, database; assert 'ZEO' not in sys.modules"
    script = textwrap.dedent(
        f"""
        import sys, types
        sys.modules["dask_zbig"] = package = types.ModuleType("dask_zbig")
        package.__path__ = [{os.path.dirname(database.__file__)!r}]
        {code}
        """
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- snapshots ---


def test_snapshot(opened):
    db = opened("memory://")
    first = put(db, "a", 1)
    manager = transaction.TransactionManager(explicit=True)
    used, conn = db.open(manager), db.open(manager)
    used.close()
    with pytest.raises(SnapshotError, match="begin a transaction"):
        database.snapshot(conn)
    manager.begin()
    second = put(db, "a", 2)
    assert database.snapshot(conn) == first
    assert conn.root()["a"] == 1
    manager.abort()
    manager.begin()
    assert database.snapshot(conn) == second
    manager.abort()
    conn.close()
    with pytest.raises(ClosedError):
        database.snapshot(conn)


def test_open_at(opened):
    db = opened("memory://")
    first = put(db, "a", 1)
    put(db, "a", 2)
    manager = transaction.TransactionManager()
    conn = database.open_at(db, first, manager)
    assert conn.root()["a"] == 1
    assert database.snapshot(conn) == first
    conn.close()
    with pytest.raises(SnapshotError, match="no snapshot ff"):
        database.open_at(db, b"\xff" * 8, manager, timeout=0.1)
    with pytest.raises(SnapshotError, match="8 bytes"):
        database.open_at(db, "yesterday", manager)
    db.close()
    with pytest.raises(ClosedError):
        database.open_at(db, first, manager)


def test_has_blobs(tmp_path, opened):
    for db, expected in [
        (opened(tmp_path / "x.fs"), True),
        (opened("memory://"), False),
        (ZODB.DB(PlainFileStorage(str(tmp_path / "plain.fs"))), False),
    ]:
        with db.transaction() as conn:
            assert database.has_blobs(conn) is expected
            conn.root()["x"] = 1
            transaction.savepoint()
            assert database.has_blobs(conn) is expected
        db.close()
