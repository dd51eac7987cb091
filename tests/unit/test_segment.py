"""Segments are read by oid, from any thread, and what was read is checked."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import threading

import pytest
import transaction
import ZODB
from persistent import Persistent
from ZODB.blob import Blob

import dask_zbig as dz
from dask_zbig.descriptors import KEPT, close_unused
from dask_zbig.errors import LoadError
from dask_zbig.storage.reader import reader
from dask_zbig.storage.segment import InlineSegment, SegmentRef, checksum
from dask_zbig.storage.sources import BytesSource, FileSource

from tests.conftest import open_clients  # isort: skip

DATA = os.urandom(10_000)


class Stranger(Persistent):
    """No segment."""


def stored(db, obj):
    """The oid of an object put into the database."""
    with db.transaction() as conn:
        conn.root()["x"] = obj
        conn.add(obj)
        return obj._p_oid


class Named:
    """As an extent map has it: something with an oid."""

    def __init__(self, oid):
        self.oid = oid


def ref_to(segment, oid, data=DATA, length=None, digest=None):
    segment._p_activate() if segment._p_jar is not None else None
    obj = segment.__class__.__new__(segment.__class__)
    obj._p_oid = oid
    return SegmentRef(obj, len(data) if length is None else length, checksum(data) if digest is None else digest)


@pytest.fixture
def db(tmp_path):
    database = dz.open(str(tmp_path / "x.fs"))
    yield database
    database.close()


def blob(data=DATA):
    made = Blob()
    with made.open("w") as file:
        file.write(data)
    return made


def inline(data=DATA):
    return InlineSegment(data)


@pytest.mark.parametrize("make", [blob, inline])
def test_read(db, make):
    oid = stored(db, make())
    source = reader(db).source(ref_to(make(), oid))
    assert source.local()
    assert source.length == len(DATA)
    assert source.read(10, 20) == DATA[10:30]
    assert source.in_file == (make is not inline)
    assert (source.descriptor() is None) == (make is inline)
    assert str(len(DATA)) in repr(source)
    source.recheck()


def test_one_source_while_anybody_uses_it(db):
    oid = stored(db, blob())
    ref = ref_to(Blob(), oid)
    one = reader(db).source(ref)
    assert reader(db).source(ref) is one
    fd = one.descriptor().fd
    del one
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_from_another_thread_while_the_connection_is_in_use(db):
    oid = stored(db, inline())
    source = reader(db).source(ref_to(InlineSegment(b""), oid))
    got = []
    with db.transaction():
        thread = threading.Thread(target=lambda: got.append(source.read(0, 5)))
        thread.start()
        thread.join(60)
    assert got == [DATA[:5]]


@pytest.mark.parametrize("wrong", [{"length": 9_999}, {"digest": 1}])
def test_damaged_inline(db, wrong):
    source = reader(db).source(ref_to(InlineSegment(b""), stored(db, inline()), **wrong))
    with pytest.raises(LoadError, match="damaged"):
        source.read(0, 1)


def test_blob_of_another_length(db):
    source = reader(db).source(ref_to(Blob(), stored(db, blob()), length=10_001))
    with pytest.raises(LoadError, match="10000 bytes where 10001 were stored"):
        source.read(0, 1)


def test_blob_truncated_under_us(db):
    oid = stored(db, blob())
    source = reader(db).source(ref_to(Blob(), oid))
    path = os.readlink(f"/proc/self/fd/{source.descriptor().fd}")
    os.chmod(path, 0o600)
    os.truncate(path, 100)
    assert source.read(0, 100) == DATA[:100]
    with pytest.raises(LoadError, match="truncated"):
        source.read(50, 100)
    with pytest.raises(LoadError, match="only 100 bytes left"):
        source.recheck()


def test_blob_missing(db):
    oid = stored(db, blob())
    ref = ref_to(Blob(), oid)
    source = reader(db).source(ref)
    os.unlink(os.readlink(f"/proc/self/fd/{source.descriptor().fd}"))
    assert source.read(0, 10) == DATA[:10]  # who has it open does not mind
    del source
    gc.collect()
    with pytest.raises(LoadError, match="cannot open the file of segment"):
        reader(db).source(ref).read(0, 1)


def test_no_such_object(db):
    source = reader(db).source(ref_to(InlineSegment(b""), b"\0\0\0\1\0\0\0\0"))
    with pytest.raises(LoadError, match="cannot load segment 0x1"):
        source.read(0, 1)


def test_not_a_segment(db):
    source = reader(db).source(ref_to(InlineSegment(b""), stored(db, Stranger())))
    with pytest.raises(LoadError, match="Stranger"):
        source.read(0, 1)


def test_references_by_oid_only(db):
    oid = stored(db, blob())
    ref = SegmentRef(Named(oid), len(DATA), checksum(DATA))
    assert ref.key == oid
    assert not ref.inline
    assert reader(db).source(ref).read(0, 3) == DATA[:3]


def test_keys_of_new_segments_differ():
    one, two = InlineSegment(b"a"), InlineSegment(b"a")
    assert SegmentRef(one, 1, 0).key != SegmentRef(two, 1, 0).key


def test_a_database_without_blobs():
    db = ZODB.DB(None)
    source = reader(db).source(ref_to(InlineSegment(b""), stored(db, inline())))
    assert source.read(5, 5) == DATA[5:10]
    assert source.local()
    db.close()


def test_sources_that_are_at_hand(tmp_path):
    source = BytesSource(b"hello")
    assert (source.length, source.local(), source.descriptor(), source.read(1, 3)) == (5, True, None, b"ell")
    path = tmp_path / "f"
    path.write_bytes(DATA)
    source = FileSource(str(path))
    fd = source.descriptor().fd
    assert (source.length, source.local(), source.read(100, 3)) == (len(DATA), True, DATA[100:103])
    with pytest.raises(LoadError, match="ends 1 bytes before"):
        source.read(len(DATA) - 1, 2)
    del source
    gc.collect()
    assert not path.exists()
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(LoadError):
        FileSource(str(path))
    os.symlink(__file__, path)
    with pytest.raises(LoadError):
        FileSource(str(path))


def test_a_file_that_is_not_used_is_not_open(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(DATA)
    source = FileSource(str(path))
    used = source.descriptor()
    close_unused()
    assert os.fstat(used.fd).st_size == len(DATA)  # somebody uses it
    assert source.descriptor() is used
    fd = used.fd
    del used
    close_unused()
    with pytest.raises(OSError):
        os.fstat(fd)
    assert source.read(7, 5) == DATA[7:12]
    close_unused()
    path.rename(tmp_path / "g")
    path.write_bytes(DATA)
    with pytest.raises(LoadError, match="not the file that it was"):
        source.read(7, 5)


def test_few_files_stay_open(tmp_path):
    sources = []
    before = len(os.listdir("/proc/self/fd"))
    for k in range(3 * KEPT):
        (tmp_path / str(k)).write_bytes(bytes([k]) * 10)
        sources.append(FileSource(str(tmp_path / str(k))))
    assert len(os.listdir("/proc/self/fd")) <= before + KEPT
    assert [s.read(3, 1)[0] for s in sources] == list(range(3 * KEPT))
    assert len(os.listdir("/proc/self/fd")) <= before + KEPT


def test_when_all_descriptors_are_taken(tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    (tmp_path / "g").write_bytes(DATA)
    one, other = FileSource(str(tmp_path / "f")), FileSource(str(tmp_path / "g"))
    close_unused()
    assert one.read(0, 9) == DATA[:9]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = one.descriptor().fd
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):  # there are none left
            while True:
                taken.append(os.dup(highest))
        assert other.read(0, 9) == DATA[:9]  # what was open, but not used, made room
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)


# guard: reader.py, `open_blob`: `close_unused`; removed -> LoadError
def test_a_blob_that_cannot_be_opened_for_want_of_descriptors(tmp_path, monkeypatch):
    db = dz.open(tmp_path / "x.fs")
    oid = stored(db, Blob(DATA))
    source = reader(db).source(SegmentRef(Named(oid), len(DATA), checksum(DATA)))
    closed, load = [], db.storage.loadBlob

    def load_blob(*args):
        if not closed:
            raise OSError(errno.EMFILE, "Too many open files")
        return load(*args)

    monkeypatch.setattr(db.storage, "loadBlob", load_blob)
    monkeypatch.setattr("dask_zbig.storage.reader.close_unused", lambda: closed.append(True))
    assert source.read(5, 10) == DATA[5:15]
    db.close()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_given_away_is_still_read(tmp_path, monkeypatch, links):
    if not links:

        def refuse(src, dst):
            raise PermissionError("a file system without hard links")

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "f"
    path.write_bytes(DATA)
    source = FileSource(str(path))
    source.give(lambda p: os.rename(p, tmp_path / "taken"))
    for _ in range(2):
        assert source.read(10, 10) == DATA[10:20]
        close_unused()
    assert not path.exists()
    del source
    gc.collect()
    assert os.listdir(tmp_path) == ["taken"]


@pytest.fixture
def cached(zeo_cache_server):
    database = dz.open(zeo_cache_server)
    yield database
    database.close()


def test_download_is_checked(cached, zeo_cache_server):
    """ZEO appends to a stale partial download and serves the sum: fetched again, then right."""
    oid = stored(cached, blob())
    other = dz.open(zeo_cache_server)
    try:
        other.storage.ping()
        _, serial = other.storage.loadBefore(oid, b"\x7f" + b"\xff" * 7)[:2]
        name = other.storage.fshelper.getBlobFilename(oid, serial)
        os.makedirs(os.path.dirname(name), exist_ok=True)
        ref = ref_to(Blob(), oid)
        assert not reader(other).source(ref).local()
        for junk in (b"x" * len(DATA), b"junk"):
            with open(name, "wb") as file:
                file.write(junk)
            assert reader(other).source(ref).read(0, len(DATA)) == DATA
            gc.collect()
            os.unlink(name)
            reader(other)._verified.clear()
        assert reader(other).source(ref).read(0, len(DATA)) == DATA
        assert reader(other).source(ref).local()
    finally:
        other.close()


def test_download_that_stays_wrong(cached):
    oid = stored(cached, blob())
    ref = ref_to(Blob(), oid, digest=1)
    with pytest.raises(LoadError, match="checksum"):
        reader(cached).source(ref).read(0, 1)


def test_reader_is_of_one_database(db):
    assert reader(db) is reader(db)
    other = ZODB.DB(None)
    assert reader(other) is not reader(db)
    other.close()
    transaction.abort()


@pytest.mark.parametrize("make", [blob, inline])
@pytest.mark.parametrize("kind", ["filestorage", "zeo", "zeo-cache"])
def test_an_oid_that_was_given_to_another_segment(tmp_path, request, kind, make):
    """As some storages do after a pack and a restart, while a client still uses the old one."""
    with open_clients(kind, str(tmp_path), request) as clients:
        other = bytes(reversed(DATA))
        segments = reader(clients.db)
        oid = stored(clients.db, make())
        old = segments.source(ref_to(make(), oid))
        assert old.read(0, 100) == DATA[:100]
        with clients.db.transaction() as connection:
            segment = connection.root()["x"]
            if make is blob:
                with segment.open("w") as file:
                    file.write(other)
            else:
                segment.data = other
        clients.db.pack()
        new = segments.source(ref_to(make(), oid, other))
        assert new.read(0, 100) == other[:100]
        assert old.read(0, 100) == DATA[:100]


# guard: FileSource.grown holds the descriptor; `descriptor().fd` -> it is another file's by the time it is used
def test_the_length_of_a_file_that_has_grown_is_its_own(tmp_path, monkeypatch):
    path = tmp_path / "scratch"
    path.write_bytes(bytes(100))
    source = FileSource(str(path))
    with open(path, "ab") as file:
        file.write(bytes(50))
    fstat, other = os.fstat, []

    def late(fd):
        close_unused()
        other.append(open(tmp_path / "other", "wb"))  # noqa: SIM115 - which gets the number, if it is free
        return fstat(fd)

    with monkeypatch.context() as patch:
        patch.setattr("dask_zbig.storage.sources.os.fstat", late)
        assert source.grown().length == 150
    for file in other:
        file.close()
