"""Servers and clients that talk TLS, and those that refuse to."""

from __future__ import annotations

import contextlib
import pathlib
import re
import socket
import ssl
import warnings
from concurrent.futures import ThreadPoolExecutor

import dask.config
import numpy as np
import pytest
import ZODB
from ZEO.ClientStorage import ClientStorage

import dask_zbig as dz
from dask_zbig import database, tls
from dask_zbig.errors import DatabaseUnavailableError, DatabaseURIError, ServerError

from tests.certificates import Hosts, as_client, log_of, serve  # isort: skip

ANYWHERE = ("localhost", 0)


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """No test here has a server that is silent in a handshake: who waits so long, waits for a turn."""
    monkeypatch.setattr(tls, "_TIMEOUT", 30.0)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    return Hosts(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def running(tmp_path_factory, hosts):
    """The path of a database and the URI of its server, for tests that need no other."""
    path = str(tmp_path_factory.mktemp("running") / "x.fs")
    with serve(path, hosts) as uri:
        yield path, uri


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "x.fs")


@pytest.mark.parametrize("shared", [True, False])
def test_arrays_over_tls(path, hosts, shared):
    server = serve(path, hosts, shared_blob_dir=shared)
    with server as uri, as_client(hosts.client, hosts.ca):
        assert uri.startswith("zeo://localhost:")
        assert ("tls=true" in uri, "blob_dir" in uri) == (True, shared)
        numbers = np.random.default_rng(0).integers(0, 1 << 60, 300_000)
        with contextlib.closing(dz.open(uri)) as db, db.transaction() as connection:
            connection.root()["A"] = A = dz.ZBigArray(numbers.shape, "i8")
            A[:] = numbers
        with contextlib.closing(dz.open(uri)) as db, db.transaction() as connection:
            assert db.storage._server.client.ssl is not None
            assert np.array_equal(connection.root()["A"][:], numbers)
            assert database.location(db).uri == uri
            assert database.location(db).alias == uri.partition("?")[0]
        assert log_of(server) == ""


def refused(uri, certificate, ca):
    """What a client is told that cannot open a database, without waiting."""
    with as_client(certificate, ca), pytest.raises(DatabaseUnavailableError) as info:
        dz.open(uri)
    address = uri.removeprefix("zeo://").partition("?")[0]
    prefix = f"the ZEO server cannot be used, {address}: "
    assert str(info.value).startswith(prefix)
    return str(info.value).removeprefix(prefix)


def test_a_server_refuses_wrong_clients(path, hosts):
    server = serve(path, hosts)
    with server as uri:
        told = "the server does not accept this side's certificate: "
        for _ in range(3):  # which is logged once
            assert refused(uri, hosts.other.issue("c"), hosts.ca) == told + "unknown ca"
            assert refused(uri, hosts.ca.issue("late", days=-1), hosts.ca) == told + "certificate expired"
            assert refused(uri, hosts.server, hosts.ca) == told + "unsupported certificate"
        with as_client(hosts.client, hosts.ca):  # and no harm was done
            dz.open(uri).close()
        for why in (
            "unable to get local issuer certificate",
            "certificate has expired",
            "unsuitable certificate purpose",
        ):
            assert log_of(server).count(f"no TLS with a client: the client's certificate is not accepted: {why}\n") == 1


def test_a_client_refuses_wrong_servers(path, hosts):
    own = hosts.ca.issue("old", host="DNS:localhost", days=-1)
    told = "the server's certificate is not accepted: "
    server = serve(path, hosts, own)
    with server as uri:
        assert refused(uri, hosts.client, hosts.ca) == told + "certificate has expired"
        assert refused(uri, hosts.client, hosts.other) == told + "self-signed certificate in certificate chain"
    with serve(path, hosts, hosts.ca.issue("there", host="DNS:elsewhere")) as uri:
        told += "Hostname mismatch, certificate is not valid for 'localhost'"
        assert refused(uri, hosts.client, hosts.ca) == told


@pytest.mark.slow
def test_rarer_refusals(path, hosts):
    with serve(path, hosts, hosts.client) as uri:
        told = "the server's certificate is not accepted: unsuitable certificate purpose"
        assert refused(uri, hosts.client, hosts.ca) == told
    lost = hosts.ca.issue("lost")
    told = "the server does not accept this side's certificate: "
    with serve(path, hosts, clients=hosts.ca.revoke(lost)) as uri:
        assert refused(uri, lost, hosts.ca) == told + "certificate revoked"
        with as_client(hosts.client, hosts.ca):
            dz.open(uri).close()
    with serve(path, hosts, clients=hosts.worker.certificate) as uri:  # only this one, whatever else its CA signed
        assert refused(uri, hosts.client, hosts.ca) == told + "unknown ca"
        with as_client(hosts.worker, hosts.ca):
            dz.open(uri).close()


def test_a_client_without_a_certificate(running, hosts):
    with (
        dask.config.set({"zbig.tls.ca-file": hosts.ca.file}),
        pytest.raises(DatabaseUnavailableError, match=r"by halves: the option zbig\.tls\.certificate is not set"),
    ):
        dz.open("zeo://localhost:1")
    nobody = ssl.create_default_context(cafile=hosts.ca.file)
    port = int(re.search(r":(\d+)", running[1])[1])
    why = tls.diagnose([("localhost", port)], nobody)
    assert why == f"localhost:{port}: the server does not accept this side's certificate: certificate required"


def test_tls_and_plain_text_do_not_mix(running, path, hosts):
    _, uri = running
    with dask.config.set({"zbig.zeo.wait-timeout": 600}):
        with pytest.raises(DatabaseUnavailableError, match="the server speaks TLS, and here it is not configured"):
            dz.open(uri.replace("&tls=true", ""))
        with pytest.raises(DatabaseUnavailableError, match="must be opened with TLS, which is not configured here"):
            dz.open(uri)
    with dz.serve(path, address=ANYWHERE) as uri:
        assert refused(uri, hosts.client, hosts.ca) == "the server does not speak TLS"
        place = uri.removeprefix("zeo://").partition("?")[0]
        for where in (
            uri,
            f"<zeoclient>\n server {place}\n</zeoclient>",
            f"<zodb>\n <zeoclient>\n server {place}\n </zeoclient>\n</zodb>",
        ):
            with (
                dask.config.set({"zbig.tls.require": True}),
                pytest.raises(DatabaseUnavailableError, match="must be opened with TLS"),
            ):
                dz.open(where)
        dz.open(uri).close()
    with dz.serve(path) as uri, as_client(hosts.client, hosts.ca, require=True):
        dz.open(uri).close()  # a unix socket is not meant


@pytest.mark.parametrize(
    ("uri", "why"), [("zeo:///run/x.sock?tls=true", "no TLS"), ("zeo://localhost:1?tls=false", "tls can only be true")]
)
def test_uris_that_make_no_sense(uri, why):
    with pytest.raises(DatabaseURIError, match=why):
        dz.open(uri)


@pytest.mark.slow
def test_a_server_that_comes_while_one_waits(path, hosts, monkeypatch):
    """The reason is found after the wait, if nobody listened before."""
    answers = [None]
    real = tls.diagnose
    monkeypatch.setattr(tls, "diagnose", lambda *args, **late: answers.pop() if answers else real(*args, **late))
    with (
        serve(path, hosts) as uri,
        as_client(hosts.other.issue("c"), hosts.ca),
        dask.config.set({"zbig.zeo.wait-timeout": 1}),
        pytest.raises(DatabaseUnavailableError, match="unknown ca"),
    ):
        dz.open(uri)


def test_what_is_no_zeo_server():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor() as pool,
        dask.config.set({"zbig.zeo.wait-timeout": 600}),
    ):
        listener.settimeout(30)
        client = pool.submit(dz.open, f"zeo://127.0.0.1:{listener.getsockname()[1]}")
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            with pytest.raises(DatabaseUnavailableError, match="what listens there is no ZEO server"):
                client.result(60)


def test_zconfig_with_ssl(running, hosts):
    path, uri = running
    place = uri.removeprefix("zeo://").partition("?")[0]
    text = (
        f"<clientstorage>\n server {place}\n blob-dir {path}.blobs\n shared-blob-dir true\n"
        f" <ssl>\n  certificate {hosts.client.certificate}\n  key {hosts.client.key}\n"
        f"  authenticate {hosts.ca.file}\n </ssl>\n</clientstorage>\n"
    )
    for where in ("%import ZEO\n" + text, f"%import ZEO\n<zodb>\n{text}</zodb>\n"):
        with contextlib.closing(dz.open(where)) as db, db.transaction() as connection:
            connection.root()["A"] = A = dz.ZBigArray(1000)
            A[:] = 7
            assert database.location(db).alias == f"zeo://{place}"
    broken = text.replace(hosts.ca.file, hosts.other.file).replace(" server", " wait-timeout 600\n server")
    for where in ("%import ZEO\n" + broken, f"%import ZEO\n<zodb>\n{broken}</zodb>\n"):
        with pytest.raises(DatabaseUnavailableError, match="the server's certificate is not accepted"):
            dz.open(where)
    with pytest.raises(DatabaseURIError, match="No such file"):
        dz.open("%import ZEO\n" + text.replace(hosts.client.key, hosts.ca.directory + "/none"))


def test_a_client_made_by_hand(running, hosts):
    path, uri = running
    context = tls.Credentials(hosts.client.certificate, hosts.client.key, hosts.ca.file).client_context()
    port = int(re.search(r":(\d+)", uri)[1])
    db = ZODB.DB(ClientStorage(("localhost", port), ssl=context, blob_dir=path + ".blobs", shared_blob_dir=True))
    here = database.location(db)
    db.close()
    assert "tls=true" in here.uri
    with as_client(hosts.client, hosts.ca):
        database.database(here).close()
    with pytest.raises(DatabaseUnavailableError, match="must be opened with TLS"):
        database.database(here)


@pytest.mark.slow
def test_whom_a_server_lets_in(path, hosts, tmp_path):
    """Certificates in a directory, of CAs or of clients themselves."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    with pytest.raises(ServerError, match="no certificates"), serve(path, hosts, clients=str(allowed)):
        pass
    (allowed / "worker.pem").write_text(pathlib.Path(hosts.worker.certificate).read_text())
    (allowed / "other-ca.crt").write_text(pathlib.Path(hosts.other.file).read_text())
    (allowed / "notes.txt").write_text("no certificate")
    with serve(path, hosts, clients=str(allowed)) as uri:
        for certificate, allowed_in in ((hosts.worker, True), (hosts.other.issue("c"), True), (hosts.client, False)):
            with as_client(certificate, hosts.ca):
                if allowed_in:
                    dz.open(uri).close()
                else:
                    with pytest.raises(DatabaseUnavailableError, match="unknown ca"):
                        dz.open(uri)
    (allowed / "bad.pem").write_text("no certificate")
    with pytest.raises(ServerError, match=r"bad\.pem' cannot be used: no certificates in it"):
        serve(path, hosts, clients=str(allowed)).__enter__()


@pytest.mark.slow
def test_tls_1_1_is_refused(path, hosts):
    server = serve(path, hosts)
    with server as uri:
        context = tls.Credentials(hosts.client.certificate, hosts.client.key, hosts.ca.file).client_context()
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            socket.create_connection(("localhost", int(re.search(r":(\d+)", uri)[1])), 30) as connection,
            pytest.raises(ssl.SSLError, match=r"(?i)protocol"),
        ):
            context.wrap_socket(connection, server_hostname="localhost")
