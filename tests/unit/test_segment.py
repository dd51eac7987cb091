"""Segments are read by oid, from any thread, and what was read is checked."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import transaction
import ZODB
from persistent import Persistent
from ZODB.blob import Blob

import dask_zbig as dz
from dask_zbig.errors import LoadError
from dask_zbig.storage.segment import (
    BytesSource,
    FileSource,
    InlineSegment,
    SegmentRef,
    checksum,
    reader,
)

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
    assert (source.fileno() is None) == (make is inline)
    assert str(len(DATA)) in repr(source)
    source.recheck()


def test_one_source_while_anybody_uses_it(db):
    oid = stored(db, blob())
    ref = ref_to(Blob(), oid)
    one = reader(db).source(ref)
    assert reader(db).source(ref) is one
    fd = one.fileno()
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
    path = os.readlink(f"/proc/self/fd/{source.fileno()}")
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
    os.unlink(os.readlink(f"/proc/self/fd/{source.fileno()}"))
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
    assert (source.length, source.local(), source.fileno(), source.read(1, 3)) == (5, True, None, b"ell")
    path = tmp_path / "f"
    path.write_bytes(DATA)
    source = FileSource(str(path))
    fd = source.fileno()
    path.unlink()
    assert (source.length, source.local(), source.read(100, 3)) == (len(DATA), True, DATA[100:103])
    with pytest.raises(LoadError, match="ends 1 bytes before"):
        source.read(len(DATA) - 1, 2)
    del source
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(LoadError):
        FileSource(str(path))
    os.symlink(__file__, path)
    with pytest.raises(LoadError):
        FileSource(str(path))


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
