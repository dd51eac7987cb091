"""What our ZEO client adds to ZEO's own. (What it must forget and leave behind: see test_commit_failures.py.)"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile

import pytest
import transaction
from ZEO.Exceptions import ClientDisconnected

import dask_zbig as dz
from dask_zbig.database import sync

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
