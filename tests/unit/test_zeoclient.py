"""What our ZEO client adds to ZEO's own. (What it must forget and leave behind: see test_commit_failures.py.)"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import dask
import pytest
import transaction
from ZEO.Exceptions import ClientDisconnected
from ZODB.utils import maxtid, p64, z64

import dask_zbig as dz
from dask_zbig.database import sync
from dask_zbig.zeoserver import _ClientHandler

from tests.proxy import Proxy, Trouble  # isort: skip


@pytest.fixture
def opened(tmp_path):
    """A database over a network that may fail, and that network."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="t", dir="/tmp"))  # of a short name
        server, proxy = os.path.join(place, "zeo"), os.path.join(place, "proxy")
        uri = stack.enter_context(dz.serve(tmp_path / "x.fs", address=server))
        network = stack.enter_context(contextlib.closing(Proxy(server)))
        network.listen(proxy)
        yield stack.enter_context(contextlib.closing(dz.open(uri.replace(server, proxy, 1)))), network


@pytest.mark.parametrize("word", [b"tpc_begin", b"storea", b"vote", b"tpc_finish"])
def test_a_commit_whose_connection_is_lost_is_aborted_without_a_second_error(opened, caplog, word):
    db, network = opened
    connection = db.open(transaction.TransactionManager())
    network.expect(Trouble("lose", word))
    connection.root()["A"] = dz.ZBigArray(100)
    with caplog.at_level(logging.ERROR, "txn"):
        with pytest.raises(ClientDisconnected):
            connection.transaction_manager.commit()
        connection.transaction_manager.abort()
    assert "tpc_abort" not in caplog.text
    sync(db)
    connection.root()["A"] = dz.ZBigArray(100)
    connection.transaction_manager.commit()
    connection.close()


# guard: ahead.py, `patiently`; removed -> ClientDisconnected
@pytest.mark.parametrize("use", [lambda A: A.prefetch(), lambda A: A[5], lambda A: A[:10].sum()])
def test_a_connection_that_is_lost_while_the_extent_map_is_loaded_is_made_again(opened, use):
    db, network = opened
    with db.transaction() as connection:
        connection.root()["A"] = A = dz.ZBigArray(100)
        A[5] = 1
    with contextlib.closing(dz.open(dz.database.location(db).uri)) as other, other.transaction() as connection:
        A = connection.root()["A"]
        len(A)
        A._file._p_activate()
        network.expect(Trouble("lose", b"loadBefore"))
        assert use(A) in (None, 1)
        assert network.happened
        assert A[5] == 1


# guard: zeoloads.py, `_answer`: since the last piece; removed -> the server has not answered
def test_a_blob_that_takes_longer_than_the_time_out_but_comes(tmp_path):
    pieces = 20
    size = pieces * 59_000  # ZEO's
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="t", dir="/tmp"))
        server, proxy = os.path.join(place, "zeo"), os.path.join(place, "proxy")
        uri = stack.enter_context(dz.serve(tmp_path / "x.fs", address=server, shared_blob_dir=False))
        with contextlib.closing(dz.open(uri)) as db, db.transaction() as connection:
            connection.root()["A"] = A = dz.ZBigArray(size, "u1")
            A[:] = 7
        network = stack.enter_context(contextlib.closing(Proxy(server)))
        network.listen(proxy)
        db = stack.enter_context(contextlib.closing(dz.open(uri.replace(server, proxy, 1))))
        connection = db.open(transaction.TransactionManager())
        slow = [Trouble("delay", b"receiveBlobChunk", to_server=False, seconds=0.4)] * pieces  # one each
        with dask.config.set({"zbig.load-timeout": 3.5}):  # (all takes twice as long: there is a second try)
            network.expect(*slow)
            connection.root()["A"].prefetch()
        assert len(network.happened) == pieces
        assert connection.root()["A"].sum() == 7 * size
        connection.close()


# guard: zeoserver.py, `notify_disconnected`; removed -> what came of the blob stays in the server's directory
def test_an_upload_that_is_cut_off_leaves_nothing_at_the_server(tmp_path):
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="t", dir="/tmp"))
        server, proxy = os.path.join(place, "zeo"), os.path.join(place, "proxy")
        uri = stack.enter_context(dz.serve(tmp_path / "x.fs", address=server, shared_blob_dir=False))
        network = stack.enter_context(contextlib.closing(Proxy(server)))
        network.listen(proxy)
        db = stack.enter_context(contextlib.closing(dz.open(uri.replace(server, proxy, 1))))
        connection = db.open(transaction.TransactionManager())
        connection.root()["A"] = A = dz.ZBigArray(6 << 20, "u1")
        A[:] = 7
        network.expect(Trouble("lose", b"storeBlobChunk", nth=60))
        with pytest.raises(ClientDisconnected):
            connection.transaction_manager.commit()
        assert network.happened
        connection.transaction_manager.abort()
        sync(db)
        connection.root()["A"] = A = dz.ZBigArray(6 << 20, "u1")
        A[:] = 7
        connection.transaction_manager.commit()  # (the server has seen the end of the connection before)
        left = [os.path.join(path, name) for path, _, names in os.walk(tmp_path) for name in names]
        assert not [name for name in left if os.path.basename(os.path.dirname(name)) == "tmp"], left
        connection.close()


# guard: zeoserver.py, `_uploading`; removed -> what came of the blob stays on the full disk, open
def test_an_upload_that_fails_leaves_nothing_at_the_server(tmp_path, tiny_disk):
    with contextlib.ExitStack() as stack:
        uri = stack.enter_context(dz.serve(os.path.join(tiny_disk, "x.fs"), shared_blob_dir=False))
        stack.enter_context(dask.config.set({"zbig.scratch-directory": str(tmp_path)}))
        db = stack.enter_context(contextlib.closing(dz.open(uri)))
        connection = db.open(transaction.TransactionManager())
        connection.root()["A"] = A = dz.ZBigArray(16 << 20, "u1")
        A[:] = 7
        with pytest.raises(ClientDisconnected):
            connection.transaction_manager.commit()
        connection.transaction_manager.abort()
        sync(db)
        assert os.listdir(os.path.join(tiny_disk, "x.fs.blobs", "tmp")) == []
        connection.root()["A"] = A = dz.ZBigArray(5 << 20, "u1")  # there is room for it again
        A[:] = 7
        connection.transaction_manager.commit()
        connection.close()


# guard: zeoserver.py, `_upload = None`; removed -> written to whatever file has the descriptor's number now
def test_a_piece_without_a_beginning_is_refused(tmp_path):
    handler = _ClientHandler(SimpleNamespace(client_conflict_resolution=False), False)
    handler.storage = SimpleNamespace(temporaryDirectory=lambda: str(tmp_path))
    handler.txnlog, handler.blob_log = object(), []
    handler._check_tid = lambda *args, **kwargs: None
    handler.storeBlobStart()
    handler.storeBlobChunk(b"abc")
    number = handler.blob_tempfile[0]
    handler.storeBlobEnd(bytes(8), bytes(8), b"", 1)
    [(_, _, _, path)] = handler.blob_log
    with open(path, "rb") as file:
        assert file.read() == b"abc"
    with open(tmp_path / "other", "w+b", buffering=0) as other:
        assert other.fileno() == number
        for _ in range(40):
            with pytest.raises(ValueError, match="beginning"):
                handler.storeBlobChunk(bytes(59_000))
        assert os.fstat(number).st_size == 0


def test_what_is_opened_while_the_server_is_away_can_be_written_to(opened):
    db, network = opened
    connection = db.open(transaction.TransactionManager())
    connection.root()["A"] = dz.ZBigArray(100)
    connection.transaction_manager.commit()
    connection.close()
    connection = db.open(transaction.TransactionManager())
    array = connection.root()["A"]
    array._p_activate()
    network.expect(Trouble("lose", b"ping"))
    with pytest.raises(dz.DatabaseUnavailableError):
        sync(db)
    assert not connection.isReadOnly()
    view = array[:]
    view[5] = 7
    sync(db)
    connection.transaction_manager.commit()
    assert array[5] == 7
    connection.close()


def test_a_server_that_hangs_up_is_not_flooded(opened):
    """One that refuses certificates after a restart does so. ZEO's client connects again hundreds of times a second."""
    db, network = opened
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as place, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(place, "s"))
        listener.listen(1000)
        listener.settimeout(30)
        db.storage.new_addr(os.path.join(place, "s"))
        began = time.monotonic()
        network.cut()
        times = []
        for _ in range(4):
            listener.accept()[0].close()
            times.append(time.monotonic())
    assert times[3] - began > 1.9


def test_a_server_that_never_greets_is_left_and_asked_again(opened, monkeypatch):
    """A hung one, or a forwarder whose server is gone. By ZEO's own client it would be waited for for ever."""
    monkeypatch.setattr("dask_zbig.storage.zeoclient._PatientIO.GREETING", 0.2)
    db, network = opened
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as place, socket.socket(socket.AF_UNIX) as listener:
        silent = os.path.join(place, "s")
        listener.bind(silent)
        listener.listen()
        listener.settimeout(30)
        good = db.storage._addr
        db.storage.new_addr([silent])
        network.cut()
        with contextlib.closing(listener.accept()[0]) as first, contextlib.closing(listener.accept()[0]) as second:
            for end in (first, second):
                end.settimeout(30)
                assert end.recv(1) == b""
        monkeypatch.undo()  # the good one may take its time
        db.storage.new_addr(good)
        sync(db)
    connection = db.open(transaction.TransactionManager())
    connection.root()["A"] = dz.ZBigArray(100)
    connection.transaction_manager.commit()
    connection.close()


def test_pings_that_are_under_way_when_the_client_is_closed_end(tmp_path):
    """Tasks may still be at work when their database is closed. By ZEO's own some would wait for ever, at exit, too."""

    def ping(db):
        while True:
            sync(db)

    with dz.serve(tmp_path / "x.fs") as uri, ThreadPoolExecutor(4) as pool:
        for _ in range(40):
            db = dz.open(uri)
            asking = [pool.submit(ping, db) for _ in range(4)]
            sync(db)
            db.close()
            for one in asking:
                with pytest.raises((dz.ClosedError, dz.DatabaseUnavailableError)):
                    one.result(60)


# guard: zeoloads.py, `prefetch`: it suppresses that the storage is closed; removed -> ClientDisconnected
@pytest.mark.filterwarnings("error")
def test_what_is_expected_of_a_closed_storage_does_not_come(tmp_path):
    """Whoever asks ahead is not told: the load itself tells it."""
    with dz.serve(tmp_path / "x.fs") as uri:
        db = dz.open(uri)
        storage = db.storage
        db.close()
        storage.prefetch([z64], maxtid)
        with pytest.raises(ClientDisconnected):
            storage.loadBefore(p64(1), maxtid)
