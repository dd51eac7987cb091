"""Clients of real servers: from other processes, at snapshots, in conflict."""

from __future__ import annotations

import gc
import glob
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from urllib.parse import urlsplit

import pytest
import transaction
import ZODB
from ZEO.ClientStorage import ClientStorage
from ZODB.blob import Blob

from dask_zbig import database
from dask_zbig.errors import SnapshotError
from dask_zbig.server import serve


@pytest.fixture(autouse=True)
def _time_limit():
    def out_of_time(*_):
        raise TimeoutError("the test took too long")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path_factory, monkeypatch):
    """Give the test a temporary directory for sockets and caches, and check that it is empty afterwards."""
    tmp_path_factory.getbasetemp()  # where it would be without us, not in the directory that must stay empty
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield
        gc.collect()
        assert os.listdir(directory) == []


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "data" / "x.fs")


def put_blob(db, key, data):
    blob = Blob()
    with blob.open("w") as file:
        file.write(data)
    with db.transaction() as conn:
        conn.root()[key] = blob
    return db.lastTransaction()


def get_blob(db, key):
    with db.transaction() as conn, conn.root()[key].open("r") as file:
        return file.read()


def python(code, *args, **options):
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", code, *args], **options)


CLIENT = """
import pickle, sys
from dask_zbig import database
where = pickle.loads(bytes.fromhex(sys.argv[1]))
db = database.database(where)
assert database.database(where) is db and database.location(db).alias == where.alias
tid = bytes.fromhex(sys.argv[2])
conn = database.open_at(db, tid)
print(conn.root()["a"], database.snapshot(conn) == tid)
"""


def test_location_in_a_spawned_process(path):
    with serve(path) as uri:
        db = database.open(uri)
        with db.transaction() as conn:
            conn.root()["a"] = 1
        tid = db.lastTransaction()
        with db.transaction() as conn:
            conn.root()["a"] = 2
        here = database.location(db)
        assert (here.uri, here.exclusive) == (uri, False)
        assert database.database(here) is db
        with python(CLIENT, pickle.dumps(here).hex(), tid.hex()) as client:
            assert client.communicate(timeout=200)[0] == "1 True\n"
        db.close()
        again = database.database(here)  # closed by its user: opened again, and kept
        assert again is not db
        assert database.database(here) is again
        again.close()


def test_exclusive_location_in_a_spawned_process(path):
    db = database.open(path)
    with python(CLIENT, pickle.dumps(database.location(db)).hex(), "00" * 8, stderr=subprocess.PIPE) as client:
        _, trouble = client.communicate(timeout=200)
    db.close()
    assert f"FileStorage '{path}' can be opened by one process only" in trouble
    assert f"with dz.serve('{path}') as uri: db = dz.open(uri)" in trouble


def test_secret_is_not_passed_on(path):
    with serve(path) as uri:
        db = database.open(uri + "&password=sesame")
        here = database.location(db)
        assert "sesame" not in repr(here)
        with python(CLIENT, pickle.dumps(here).hex(), "00" * 8, stderr=subprocess.PIPE) as client:
            assert "zbig.database-uris" in client.communicate(timeout=200)[1]
        db.close()


def test_plain_client_is_recognised(path):
    with serve(path) as uri:
        address = urlsplit(uri).path
        plain = ZODB.DB(ClientStorage(address, blob_dir=path + ".blobs", shared_blob_dir=True))
        here = database.register(plain)
        db = database.open(uri)
        assert here == database.location(db)
        db.close()
        plain.close()
        blind = ZODB.DB(ClientStorage(address))
        with blind.transaction() as conn:
            assert not database.has_blobs(conn)  # though it says that it provides them
        blind.close()
        settings = f"server {address}\n blob-dir {path}.blobs\n shared-blob-dir true"
        text = f"<zodb>\n <zeoclient>\n {settings}\n </zeoclient>\n</zodb>\n"
        db = database.open(text)
        assert (database.location(db).alias, database.location(db).uri) == (here.alias, text)
        db.close()


def test_lagging_client_reads_a_snapshot(path):
    with serve(path) as uri:
        one, two = database.open(uri), database.open(uri)
        late = 0
        for i in range(100):
            with one.transaction() as conn:
                conn.root()["a"] = i
            tid = one.lastTransaction()
            late += two.lastTransaction() < tid
            conn = database.open_at(two, tid)
            assert conn.root()["a"] == i
            assert database.snapshot(conn) == tid
            conn.close()
        future = (int.from_bytes(one.lastTransaction(), "big") + (1 << 40)).to_bytes(8, "big")
        with pytest.raises(SnapshotError, match="no snapshot"):
            database.open_at(two, future, timeout=0.1)
        one.close()
        two.close()


def test_snapshot_that_comes_while_one_waits(path):
    with serve(path) as uri:
        one, two = database.open(uri), database.open(uri)
        wanted = (int.from_bytes(one.lastTransaction(), "big") + 1).to_bytes(8, "big")

        def commit():
            with one.transaction() as conn:
                conn.root()["a"] = 1

        timer = threading.Timer(0.3, commit)
        timer.start()
        database.open_at(two, wanted, timeout=60).close()
        timer.join()
        one.close()
        two.close()


def test_server_syncs_and_cleans_up_after_conflicts(path):
    with serve(path) as uri:
        one, two = database.open(uri), database.open(uri)
        put_blob(one, "b", b"0")
        managers = [transaction.TransactionManager() for _ in range(2)]
        database.open_at(two, one.lastTransaction()).close()
        conns = [db.open(manager) for db, manager in zip((one, two), managers, strict=True)]
        for i, conn in enumerate(conns):
            with conn.root()["b"].open("w") as file:
                file.write(b"%d" % i)
        managers[0].commit()
        with pytest.raises(ZODB.POSException.ConflictError):
            managers[1].commit()
        managers[1].abort()
        for conn in conns:
            conn.close()
        assert get_blob(one, "b") == b"0"
        one.close()
        two.close()
        files = [name for name in glob.glob(path + ".blobs/0x*/**/*", recursive=True) if os.path.isfile(name)]
        assert len(files) == 2  # two revisions, and nothing of the third
