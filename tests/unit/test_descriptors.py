"""A file's number is used only while somebody refers to the descriptor: else another file may get it meanwhile."""

from __future__ import annotations

import os

import pytest

from dask_zbig import descriptors, segmentwriter
from dask_zbig.storage import reader, sources
from dask_zbig.storage.sources import FileSource

DATA = bytes(range(200))


@pytest.fixture
def _close_at_once(monkeypatch):
    """Before each use of a number close what nobody refers to, and open something else, as other threads might do."""

    def disturbed(name):
        original = getattr(os, name)

        def call(fd, *args):
            descriptors.close_unused()
            other = os.open("/dev/zero", os.O_RDONLY)
            try:
                return original(fd, *args)
            finally:
                os.close(other)

        return staticmethod(call)

    fake = type("os", (), {**vars(os), **{name: disturbed(name) for name in ("pread", "fstat", "fsync")}})
    monkeypatch.setattr(sources, "os", fake)
    monkeypatch.setattr(reader, "os", fake)
    monkeypatch.setattr(segmentwriter, "os", fake)


@pytest.mark.usefixtures("_close_at_once")
def test_a_scratch_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    source = FileSource(str(path))
    assert source.length == len(DATA)
    assert source.read(10, 100) == DATA[10:110]
    segmentwriter._sync(source)


def test_a_blob(local, request):
    local.new(4 << 20, "u1")
    client = local.connect()
    a = client.root["A"][:]
    a[:] = 7
    client.commit()
    request.getfixturevalue("_close_at_once")
    descriptors.close_unused()
    with local.db.transaction() as connection:
        opened = connection.root()["A"]._open()
        opened.resolve(0, 4 << 20)
        sources = opened.content(0, 4 << 20)[1]
        assert sources
        for source in sources:
            assert source.read(1000, 100) == b"\7" * 100
            source.recheck()
