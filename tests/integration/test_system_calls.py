"""System calls on views. The kernel takes no page fault of ours: what it is to read or write must be mapped."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import socket
import threading

import dask
import numpy as np
import pytest

import dask_zbig as dz
from dask_zbig.memory.space import Window

BLOCK = 2 << 20
SIZE = 2 * BLOCK


def stored(clients):
    """A committed array, as another client sees it: bytes 0..250 again and again."""
    clients.new(SIZE, "u1")
    client = clients.connect()
    client.root["A"][:] = pattern(SIZE)
    client.commit()
    other = clients.connect(other=True)
    other.begin()
    return other, other.root["A"]


@pytest.fixture
def array(local):
    return stored(local)


def pattern(size, by=0):
    return ((np.arange(size) + by) % 251).astype("u1")


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "file", "w+b", buffering=0) as opened:
        yield opened


def through_a_socket(view):
    here, there = socket.socketpair()
    got = bytearray()

    def receive():
        while len(got) < view.nbytes and (piece := there.recv(1 << 20)):
            got.extend(piece)

    with here, there:
        thread = threading.Thread(target=receive)
        thread.start()
        here.sendall(view)
        thread.join(60)
    return bytes(got)


def by_file(view, file):
    assert file.write(view) == view.nbytes
    file.seek(0)
    return file.read()


def by_os_write(view, file):
    assert os.writev(file.fileno(), [view[:100], memoryview(view)[100:]]) == view.nbytes
    return os.pread(file.fileno(), view.nbytes, 0)


def by_memcpy(view, file):
    buffer = ctypes.create_string_buffer(view.nbytes)
    ctypes.memmove(buffer, view.ctypes.data, view.nbytes)
    return buffer.raw


OUTPUTS = {
    "file.write": by_file,
    "os.writev": by_os_write,
    "sendall": lambda view, file: through_a_socket(view),
    "memcpy": by_memcpy,
    "memoryview": lambda view, file: bytes(memoryview(view)),
    "BytesIO": lambda view, file: io.BytesIO(view).getvalue(),
    "tofile": lambda view, file: (view.tofile(file), file.seek(0), file.read())[2],
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_system_calls_that_read(array, file, output):
    _, A = array
    A.prefetch()
    assert output(A[:], file) == pattern(SIZE).tobytes()


def readinto(view, file):
    assert file.readinto(view) == view.nbytes


def preadv(view, file):
    assert os.preadv(file.fileno(), [view], 0) == view.nbytes


def send(to, data):
    with contextlib.suppress(BrokenPipeError):
        to.sendall(data)


def recv_into(view, file):
    here, there = socket.socketpair()
    with here, there:
        thread = threading.Thread(target=send, args=(here, file.read()))
        thread.start()
        try:
            done = 0
            while done < view.nbytes:
                done += there.recv_into(view[done:])
        finally:
            there.close()
            thread.join(60)


def fread(view, file):
    """As C programs do, and NumPy's readers."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fdopen.restype = libc.setvbuf.restype = ctypes.c_void_p
    libc.fread.restype = ctypes.c_size_t
    stream = ctypes.c_void_p(libc.fdopen(os.dup(file.fileno()), b"r"))
    got = libc.fread(ctypes.c_void_p(view.ctypes.data), 1, ctypes.c_size_t(view.nbytes), stream)
    libc.fclose(stream)
    if got < view.nbytes:
        raise OSError(errno.EFAULT, "short")


INPUTS = {"readinto": readinto, "preadv": preadv, "recv_into": recv_into, "fread": fread}
FIRST, LAST = 5000, BLOCK + 70_001


@pytest.mark.parametrize("read", INPUTS.values(), ids=INPUTS)
def test_system_calls_that_write(local, file, read):
    write_and_look(*stored(local), file, read)


def test_readinto_of_whatever_storage(clients, file):
    write_and_look(*stored(clients), file, readinto)


def write_and_look(client, A, file, read):
    """With `prefetch(writable=True)`; without it they are refused. What is read is saved, and nothing beside it."""
    new = pattern(LAST - FIRST, by=100)
    file.write(new)
    file.seek(0)
    with pytest.raises(OSError) as info:
        read(A[FIRST:LAST], file)
    assert info.value.errno == errno.EFAULT
    client.abort()
    file.seek(0)
    A.prefetch(np.s_[FIRST:LAST], writable=True)
    read(A[FIRST:LAST], file)
    client.commit()
    expected = pattern(SIZE)
    expected[FIRST:LAST] = new
    other = client.owner.connect(other=True)
    other.begin()
    np.testing.assert_array_equal(other.root["A"][:], expected)
    np.testing.assert_array_equal(A[:], expected)


def test_writable_until_the_next_savepoint(array, file):
    client, A = array
    file.write(bytes(1000))
    view = A[:1000]
    A.prefetch(np.s_[:1000], writable=True)
    file.seek(0)
    file.readinto(view)
    savepoint = client.savepoint()
    file.seek(0)
    with pytest.raises(OSError, match="Bad address"):
        file.readinto(view)
    A.prefetch(np.s_[:1000], writable=True)
    file.seek(0)
    file.write(bytes([9]) * 1000)
    file.seek(0)
    file.readinto(view)
    savepoint.rollback()
    assert not view.any()
    client.abort()
    assert (view == pattern(1000)).all()


# guard: ahead.py, `bring_writable`: again after EAGAIN; removed -> an error
def test_a_writable_prefetch_of_what_is_dropped_meanwhile(array, file, monkeypatch):
    _client, A = array
    original, calls = Window.write, []

    def write(self, lo, data, size):
        calls.append(lo)
        if len(calls) == 1:
            A._open().space.drop(0, SIZE)
        return original(self, lo, data, size)

    monkeypatch.setattr(Window, "write", write)
    A.prefetch(writable=True)
    assert len(calls) == 2
    file.write(bytes(1000))
    file.seek(0)
    file.readinto(A[:1000])
    assert not A[:1000].any()


# guard: ahead.py, `bring_writable`: asks again after EFAULT; removed -> the error says nothing of the file
def test_a_writable_prefetch_of_a_file_that_was_truncated(array):
    client, A = array
    A[:].sum()
    kept = A._open().content(0, SIZE)[1]  # as a load that goes on at the same time: its descriptor is used
    for source in kept:
        os.truncate(f"/proc/self/fd/{source.descriptor().fd}", 4096)
    with dask.config.set({"zbig.load-timeout": 0.3}), pytest.raises(dz.LoadError, match="has only 4096 bytes left"):
        A.prefetch(writable=True)
    client.abort()


def test_a_writable_prefetch_alone_changes_nothing(array):
    client, A = array
    leaf = next(iter(A._file.leaves(0, SIZE)))[1]
    leaf._p_activate()
    before = leaf._p_serial
    A.prefetch(writable=True)
    client.commit()
    other = client.owner.connect()
    other.begin()
    assert (other.root["A"][:] == pattern(SIZE)).all()
    leaf._p_activate()
    assert leaf._p_serial == before  # nothing was stored


def test_a_writable_prefetch_of_what_cannot_be_written(clients):
    clients.new(10, "u1")
    tid = clients.db.lastTransaction()
    connection = clients.db.open(at=tid)
    A = connection.root()["A"]
    A.prefetch()
    with pytest.raises(ValueError, match="read-only"):
        A.prefetch(writable=True)
    connection.close()
    R = dz.RAMArray(10, "u1")
    R.prefetch(writable=True)
    assert io.BytesIO(b"abc").readinto(R[:3]) == 3


def test_a_writable_prefetch_of_more_than_the_disk_has(tmp_path, tiny_disk):
    """Nothing is lost by it."""
    import dask
    import transaction

    with dask.config.set({"zbig.scratch-directory": tiny_disk}):
        db = dz.open(tmp_path / "x.fs")
        connection = db.open()
        connection.root()["A"] = A = dz.ZBigArray(64 << 20, "u1")
        transaction.commit()
        A[5] = 1
        with pytest.raises(dz.ScratchError, match="No space left"):
            A.prefetch(writable=True)
        A[6] = 2
        transaction.commit()
        assert A[5:8].tolist() == [1, 2, 0]
        connection.close()
        db.close()
