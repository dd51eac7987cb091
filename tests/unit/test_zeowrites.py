"""What happens to messages when the connection has just ended. (To those of Python before 3.12: nothing, anyway.)"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import SimpleNamespace

import pytest
import transaction
from ZEO.Exceptions import ClientDisconnected

import dask_zbig as dz
from dask_zbig.database import sync
from dask_zbig.zeoserver import _Acceptor


# guard: zeoclient.py, both calls of `write_carefully`; what they do removed, on 3.12 -> TypeError, or deaf for 11 s
@pytest.mark.parametrize("end", ["close", "abort"])  # by the peer, and by an error
def test_a_client_that_asks_a_server_that_has_just_gone(tmp_path, caplog, end):
    with dz.serve(tmp_path / "x.fs") as uri, contextlib.closing(dz.open(uri)) as db:
        client = db.storage._server.client

        async def ask():
            protocol = client.protocol
            getattr(protocol.sm_protocol.transport._transport, end)()
            for future in [protocol.call_sync("lastTransaction", ()) for _ in range(3)]:
                with pytest.raises(ClientDisconnected):
                    await future

        for _ in range(2):  # the first connection, and one made again
            asyncio.run_coroutine_threadsafe(ask(), client.loop).result(60)
            sync(db)
            connection = db.open(transaction.TransactionManager())
            connection.root()["x"] = 1
            connection.transaction_manager.commit()
            connection.close()
    assert [record for record in caplog.records if record.name == "asyncio"] == []  # the next one is read at once


# guard: zeoserver.py, `write_carefully`; removed, from Python 3.12 on -> TypeError (close)
@pytest.mark.parametrize("end", ["close", "abort"])
def test_a_server_that_tells_a_client_that_has_just_gone(end):
    async def serve_two():
        troubles = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: troubles.append(context))
        acceptor = object.__new__(_Acceptor)
        acceptor.event_loop, acceptor.addr, acceptor.msgpack = loop, "x", True
        handler = SimpleNamespace(notify_connected=lambda protocol: None, notify_disconnected=lambda: None)
        acceptor.storage_server = SimpleNamespace(create_client_handler=lambda: handler)
        numbers = []
        for last in (False, True):
            ours, other = socket.socketpair()
            numbers.append(ours.fileno())
            with contextlib.closing(other):
                other.setblocking(False)
                transport, protocol = await loop.create_connection(acceptor.factory, sock=ours)
                assert await loop.sock_recv(other, 100)  # the greeting
                await loop.sock_sendall(other, b"\0\0\0\2M5")
                while protocol.protocol_version is None:
                    await asyncio.sleep(0)  # until it is read
                if not last:
                    getattr(transport, end)()
                    for _ in range(3):
                        protocol.call_async("invalidateTransaction", (bytes(8), []))
                else:
                    transport.close()
                while protocol.connected:
                    await asyncio.sleep(0)
        assert numbers[0] == numbers[1]
        assert troubles == []

    asyncio.run(asyncio.wait_for(serve_two(), 30))
