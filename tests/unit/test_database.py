"""Opening databases, locating them from elsewhere, snapshots; without a server of ours."""

from __future__ import annotations

import gc
import os
import pathlib
import pickle
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time

import dask.config
import pytest
import transaction
import ZODB
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage as PlainFileStorage
from ZODB.MappingStorage import MappingStorage

from dask_zbig import config, database, uris
from dask_zbig.errors import (
    ClosedError,
    DatabaseUnavailableError,
    DatabaseURIError,
    ForkError,
    SnapshotError,
    ZBigError,
)
from dask_zbig.storage import filestorage
from dask_zbig.storage.tempdir import PrivateDirectory


@pytest.fixture(autouse=True)
def _time_limit():
    def out_of_time(*_):
        raise TimeoutError("the test took too long")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(60)
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


def put_blob(db, key, data):
    blob = Blob()
    with blob.open("w") as file:
        file.write(data)
    put(db, key, blob)


def get(db, key):
    with db.transaction() as conn:
        value = conn.root()[key]
        if isinstance(value, Blob):
            with value.open("r") as file:
                return file.read()
        return value


# --- what can be opened ---


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_path(tmp_path, opened, kind):
    path = tmp_path / "data" / "x.fs"
    db = opened(kind(path))
    assert isinstance(db, ZODB.DB)
    put_blob(db, "b", b"blob")
    assert (tmp_path / "data" / "x.fs.blobs").is_dir()
    for private in (path, path.parent, tmp_path / "data" / "x.fs.blobs"):
        assert stat.S_IMODE(private.stat().st_mode) & 0o077 == 0
    db.close()
    assert get(opened(kind(path)), "b") == b"blob"


def test_relative_path(tmp_path, opened, monkeypatch):
    monkeypatch.chdir(tmp_path)
    db = opened("x.fs")
    monkeypatch.chdir("/")
    put_blob(db, "b", b"blob")
    assert database.location(db).alias == f"file://{tmp_path.resolve()}/x.fs"
    assert (tmp_path / "x.fs.blobs").is_dir()


def test_file_uri_is_the_same_database_as_its_path(tmp_path, opened):
    path = str(tmp_path / "x.fs")
    db = opened(path)
    put_blob(db, "b", b"blob")
    alias = database.location(db).alias
    db.close()
    db = opened("file://" + path + "?connection_cache_size=7&database_name=n")
    assert (get(db, "b"), db.getCacheSize(), db.database_name) == (b"blob", 7, "n")
    assert database.location(db).alias == alias


def test_read_only_file_can_be_opened_twice(tmp_path, opened):
    path = str(tmp_path / "x.fs")
    db = opened(path)
    put_blob(db, "b", b"blob")
    reader = opened(f"file://{path}?read_only=1")
    here = database.location(reader)
    assert not here.exclusive
    assert get(opened(here.uri), "b") == b"blob"


def test_memory(opened):
    db = opened("memory://", cache_size=11)
    put(db, "a", 1)
    assert (get(db, "a"), db.getCacheSize()) == (1, 11)
    with db.transaction() as conn:
        assert not database.has_blobs(conn)


def test_demo(opened):
    db = opened("demo:(memory://a)/(memory://b)")
    assert database.location(db).exclusive


@pytest.mark.parametrize("around", ["{}", "<zodb main>\n cache-size 12\n {}\n</zodb>"])
def test_zconfig_text(tmp_path, opened, around):
    text = around.format(f"<filestorage>\n path {tmp_path}/x.fs\n blob-dir {tmp_path}/b\n</filestorage>\n")
    db = opened(text)
    put_blob(db, "b", b"blob")
    here = database.location(db)
    assert (here.alias, here.uri, here.exclusive) == (f"file://{tmp_path.resolve()}/x.fs", None, True)
    assert not ("<zodb" in text and db.getCacheSize() != 12)


def test_zconfig_file(tmp_path, opened):
    (tmp_path / "z.conf").write_text("<zodb>\n <mappingstorage/>\n</zodb>\n")
    db = opened(f"zconfig://{tmp_path}/z.conf")
    assert isinstance(db.storage, MappingStorage)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("nosuch://x", "scheme 'nosuch'"),
        ("zeo:localhost:1", "followed by '://'"),
        ("zeo://", "neither a host"),
        ("zeo://h:port", "port"),
        ("zeo://h:1?shared_blob_dir=1", "needs a blob_dir"),
        ("zeo://h:1?wait_timeout=soon", "soon"),
        ("zeo://h:1?colour=red", "colour"),
        ("memory://x?colour=red", "colour"),
        ("zconfig:///no/such/file", "no/such/file"),
        ("<zodb>\n</zodb>", "no storage"),
        ("<zodb>\n <mappingstorage/>\n", "unclosed"),
        ("<zeoclient>\n</zeoclient>", "server"),
        ("a\0b", "null byte"),
        (7, "type int"),
        (None, "type NoneType"),
    ],
)
def test_bad_text(text, why):
    with pytest.raises(DatabaseURIError, match="names no database") as info:
        database.open(text)
    assert why in str(info.value)
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize(
    "text",
    [
        "nosuch://ann:sesame@host/x",
        "zeo://h:1?password=sesame&colour=red",
        "<zeoclient>\n server h:1\n password sesame street\n colour red\n</zeoclient>",
    ],
)
def test_secrets_stay_secret(text):
    with pytest.raises(DatabaseURIError) as info:
        database.open(text)
    assert "sesame" not in str(info.value)
    assert "***" in str(info.value)
    assert info.value.__cause__ is None


def test_mask():
    assert (
        uris.mask("postgres://u:p@h/d?dsn=password%3Dx&a=1") == "postgres://u:***@h/d?dsn=password%3D***&a=1"
    )
    harmless = "<ssl>\n password-function my.module.function\n</ssl>\nzeo://localhost:1?blob_dir=/a@b:c"
    assert uris.mask(harmless) == harmless


def test_directory_and_other_files(tmp_path):
    with pytest.raises(DatabaseURIError, match="directory"):
        database.open(tmp_path)
    (tmp_path / "text").write_text("This is not a database.")
    with pytest.raises(DatabaseURIError, match="not a FileStorage"):
        database.open(tmp_path / "text")
    assert os.listdir(tmp_path) == ["text"]
    with pytest.raises(DatabaseUnavailableError, match="text"):
        database.open(tmp_path / "text" / "x.fs")


def test_unknown_option(tmp_path):
    with pytest.raises(TypeError, match="colour"):
        database.open(tmp_path / "x.fs", colour="red")
    with pytest.raises(DatabaseURIError, match="<zodb> section"):
        database.open("<zodb>\n <mappingstorage/>\n</zodb>", pool_size=3)


def test_locked_file(tmp_path, opened):
    path = tmp_path / "x.fs"
    code = "import sys; from dask_zbig import database; db = database.open(sys.argv[1]); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(
            DatabaseUnavailableError, match=r"serve it with dz\.serve\(path\) or `dask-zbig serve`"
        ):
            database.open(path)
        other.communicate("\n", timeout=20)
    opened(path)  # a failed attempt holds nothing


def test_no_server(tmp_path):
    with dask.config.set({"zbig.zeo.wait-timeout": 1}):
        start = time.monotonic()
        with pytest.raises(DatabaseUnavailableError, match="no ZEO server answers"):
            database.open(f"zeo://{tmp_path}/sock")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            with pytest.raises(DatabaseUnavailableError, match="no ZEO server answers"):
                database.open(f"zeo://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - start < 10


def test_missing_shared_blob_directory(tmp_path):
    with pytest.raises(DatabaseUnavailableError, match="not on this host"):
        database.open(f"zeo://{tmp_path}/sock?blob_dir={tmp_path}/none&shared_blob_dir=true")


# --- the registry ---


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
    opening = []

    def slowly(where, options):
        opening.append(where)
        time.sleep(0.2)
        if where == "bad":
            raise DatabaseUnavailableError("bad")
        return ZODB.DB(None), where

    monkeypatch.setattr("dask_zbig.opening.open_database", slowly)
    for uri in ("good", "bad"):
        results = []

        def ask(uri=uri, results=results):
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
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


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


# --- what lies below ---


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
    assert get(db, "b") == b"again"


def test_pack_keeps_mode_and_no_copies(tmp_path, opened):
    path = tmp_path / "x.fs"
    db = opened(path)
    path.chmod(0o640)
    for i in range(3):
        put_blob(db, "b", b"%d" % i)
    db.pack(time.time() + 1)
    assert get(db, "b") == b"2"
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


def test_private_directories_of_the_dead_are_removed(tmp_path):
    code = (
        "import os, sys; from dask_zbig.storage.tempdir import PrivateDirectory as P;"
        "d = P('test', sys.argv[1]); open(d.path + '/x', 'w').close(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], timeout=30)
    (left,) = tmp_path.iterdir()
    mine = PrivateDirectory("test", str(tmp_path))
    assert left.exists()  # too young to be sure
    for path in (left, pathlib.Path(mine.path)):
        os.utime(path, (0, 0))
    PrivateDirectory("test", str(tmp_path)).close()
    assert not left.exists()
    assert os.path.exists(mine.path)
    mine.close()
    assert not list(tmp_path.iterdir())


# --- config ---


def test_config():
    assert config.get("load-timeout") == 30.0
    assert config.get("scratch-directory") is None
    assert config.get("database-uris") == {}
    with dask.config.set({"zbig.inline-limit": "1 MiB", "zbig.lease-seconds": "1h", "zbig.load_timeout": 5}):
        assert config.get("inline-limit") == 1 << 20
        assert config.get("lease-seconds") == 3600.0
        assert config.get("load-timeout") == 5.0
    for value in ("soon", 0, -1):
        with (
            dask.config.set({"zbig.load-timeout": value}),
            pytest.raises(ValueError, match=r"zbig\.load-timeout"),
        ):
            config.get("load-timeout")
    with pytest.raises(KeyError):
        config.get("nosuch")
