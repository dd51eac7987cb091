"""What text can open a database, and what is said when it cannot."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import time

import dask.config
import pytest
import ZODB
from ZODB.blob import Blob
from ZODB.MappingStorage import MappingStorage

from dask_zbig import database, uris
from dask_zbig.errors import (
    DatabaseUnavailableError,
    DatabaseURIError,
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


def test_what_is_opened_for_reading_is_left_as_it_is(tmp_path, opened):
    path = str(tmp_path / "x.fs")
    db = opened(path)
    put_blob(db, "b", b"blob")
    db.close()
    os.rmdir(path + ".blobs/tmp")
    before = sorted(os.listdir(path + ".blobs"))
    assert get(opened(f"file://{path}?read_only=1"), "b") == b"blob"
    assert sorted(os.listdir(path + ".blobs")) == before


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
    assert uris.mask("postgres://u:p@h/d?dsn=password%3Dx&a=1") == "postgres://u:***@h/d?dsn=password%3D***&a=1"
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
    code = "import sys; from dask_zbig import database;db = database.open(sys.argv[1]); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(DatabaseUnavailableError, match=r"serve it with dz\.serve\(path\) or `dask-zbig serve`"):
            database.open(path)
        other.communicate("\n", timeout=200)
    opened(path)  # a failed attempt holds nothing


def test_no_server(tmp_path):
    with dask.config.set({"zbig.zeo.wait-timeout": 1}):
        start = time.monotonic()
        with pytest.raises(DatabaseUnavailableError, match="no ZEO server answers"):
            database.open(f"zeo://{tmp_path}/sock")
        with (
            socket.create_server(("127.0.0.1", 0)) as silent,
            pytest.raises(DatabaseUnavailableError, match="no ZEO server answers"),
        ):
            database.open(f"zeo://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - start < 30  # the option's default, for one of them


def test_missing_shared_blob_directory(tmp_path):
    with pytest.raises(DatabaseUnavailableError, match="not on this host"):
        database.open(f"zeo://{tmp_path}/sock?blob_dir={tmp_path}/none&shared_blob_dir=true")
