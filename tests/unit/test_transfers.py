"""Blobs between a ZEO server and its clients."""

from __future__ import annotations

import os
import stat

import pytest

from dask_zbig.storage import transfers
from dask_zbig.storage.transfers import Download


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "0.blob")


def content(path):
    with open(path, "rb") as file:
        return file.read()


# guard: Steps.add writes STEP at a time; a pwrite for each piece -> the folios of the page cache are small
@pytest.mark.parametrize("piece", [59_000, 1 << 20, 5_000_000])
def test_a_blob_is_written_in_whole_steps(path, monkeypatch, piece):
    sizes = []
    write = os.write
    monkeypatch.setattr(transfers.os, "write", lambda fd, data: (sizes.append(len(data)), write(fd, data))[1])
    data = os.urandom(11_000_000)
    incoming = Download(path)
    for at in range(0, len(data), piece):
        incoming.write(data[at : at + piece])
        assert not os.path.exists(path)
    incoming.finish()
    incoming.close()
    assert content(path) == data
    assert all(size % transfers.STEP == 0 for size in sizes[:-1])
    assert sizes[-1] == len(data) % transfers.STEP


def test_a_finished_blob_has_its_name_and_cannot_be_written_to(path):
    incoming = Download(path)
    incoming.write(b"abc")
    incoming.finish()
    incoming.close()
    assert os.listdir(os.path.dirname(path)) == ["0.blob"]
    assert stat.S_IMODE(os.stat(path).st_mode) == stat.S_IREAD


def test_an_empty_blob(path):
    incoming = Download(path)
    incoming.finish()
    incoming.close()
    assert content(path) == b""


def test_what_is_not_finished_is_removed(path):
    incoming = Download(path)
    incoming.write(b"abc")
    incoming.close()
    assert not os.listdir(os.path.dirname(path))


def test_what_another_download_has_left_is_replaced(path):
    with open(path + ".dl", "wb") as file:
        file.write(b"stale")
    incoming = Download(path)
    incoming.write(b"abc")
    incoming.finish()
    incoming.close()
    assert content(path) == b"abc"


# guard: Download._is_ours; removed -> the first one's end gives the half of the second one the blob's name
def test_a_download_that_was_given_up_does_not_finish_the_next_one(path):
    late = Download(path)
    late.write(b"abc")
    following = Download(path)
    following.write(b"ab")
    late.finish()
    late.close()
    assert os.listdir(os.path.dirname(path)) == ["0.blob.dl"]
    following.write(b"c")
    following.finish()
    following.close()
    assert content(path) == b"abc"
