"""What a server with TLS is told, and refuses: addresses, certificates, passwords, clients that choose pickle."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys

import dask.config
import pytest
from zodbpickle import pickle as zodbpickle

import dask_zbig as dz
from dask_zbig import tls
from dask_zbig.errors import DatabaseUnavailableError, ServerError

from tests.certificates import Hosts, as_client, log_of, openssl, serve  # isort: skip
from tests.spy import arguments, everything_in  # isort: skip

ANYWHERE = ("localhost", 0)
HOW_TO = pathlib.Path(__file__).parents[2] / "docs" / "howto" / "hosts.md"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    return Hosts(tmp_path_factory.mktemp("hosts"))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "x.fs")


def test_settings_that_are_refused(path, hosts, tmp_path):
    own, key, ca = hosts.server.certificate, hosts.server.key, hosts.ca.file
    missing = str(tmp_path / "none.pem")
    for options, why in (
        ({"tls_certificate": own}, "those of its clients"),
        ({"tls_clients": ca}, "its certificate is not given"),
        ({"tls_key_password": "env:X"}, "its certificate is not given"),
    ):
        with pytest.raises(ServerError, match=why):
            dz.serve(path, address=ANYWHERE, **options)
    for names, why in (
        ((missing, None, ca), r"none\.pem' cannot be used: No such file"),
        ((own, missing, ca), r"none\.pem' cannot be used: No such file"),
        ((own, key, missing), "the trusted certificates .* cannot be used: No such file"),
        ((own, None, ca), "cannot be used"),  # there is no key in it
        ((own, hosts.client.key, ca), "do not belong together"),
        ((own, key, key), "no certificates in it"),
    ):
        with pytest.raises(tls.SettingsError, match=why):
            tls.Credentials(*names).server_context()
    options = {"tls_certificate": own, "tls_key": missing, "tls_clients": ca}
    with pytest.raises(ServerError, match="No such file"), dz.serve(path, address=ANYWHERE, **options):
        pass
    with pytest.raises(ServerError, match="TLS is for TCP"), serve(path, hosts, address=str(tmp_path / "sock")):
        pass
    assert not os.path.exists(path)


@pytest.mark.slow
def test_insecure_is_said_and_warned_of(path):
    with pytest.raises(ServerError, match="without TLS"), dz.serve(path, address=("0.0.0.0", 0)):
        pass
    server = dz.serve(path, address=("0.0.0.0", 0), insecure=True)
    with server as uri:
        assert "INSECURE: whoever can reach 0.0.0.0:0" in log_of(server)
        port = int(re.search(r":(\d+)", uri)[1])
        assert uri == f"zeo://{socket.getfqdn()}:{port}"  # another host has no use for our blob directory
        dz.open(f"zeo://127.0.0.1:{port}").close()


@pytest.mark.slow
def test_listening_on_all_addresses_with_tls(path, hosts):
    with serve(path, hosts, address=("0.0.0.0", 0)) as uri, as_client(hosts.client, hosts.ca):
        port = int(re.search(r":(\d+)", uri)[1])
        assert uri == f"zeo://{socket.getfqdn()}:{port}?tls=true"
        dz.open(f"zeo://localhost:{port}").close()


def test_a_key_that_others_can_read_is_warned_of(hosts, tmp_path, caplog):
    key = tmp_path / "open.key"
    key.write_text(pathlib.Path(hosts.client.key).read_text())
    for mode, warned in ((0o600, False), (0o640, True)):
        caplog.clear()
        key.chmod(mode)
        tls.Credentials(hosts.client.certificate, str(key), hosts.ca.file).client_context()
        assert ("can be read by others" in caplog.text) is warned


class MakesFile:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({self.path!r}, 'w').close()",)


def test_a_client_that_speaks_pickle_is_turned_away(path, tmp_path):
    """ZEO announces msgpack, and lets the client choose. Its server would evaluate what is in this message."""
    made = str(tmp_path / "made")
    message = zodbpickle.dumps((1, False, "register", (MakesFile(made),)), 3).replace(b"c__builtin__\n", b"cbuiltins\n")
    server = dz.serve(path)
    with server as uri:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(re.search(r"zeo://([^?]+)", uri)[1])
            assert client.recv(6, socket.MSG_WAITALL) == b"\0\0\0\x02M5"
            client.sendall(b"\0\0\0\x02Z5" + struct.pack(">I", len(message)) + message)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        assert not os.path.exists(made)
        assert "speaks pickle" in log_of(server)
        dz.open(uri).close()  # it goes on


# -- passwords of keys

SECRET = "open sesame, street"


def test_keys_with_passwords(path, hosts, tmp_path, monkeypatch):
    own, mine = hosts.server.encrypted(SECRET), hosts.client.encrypted(SECRET)
    (tmp_path / "secret").write_text(SECRET + "\n")
    (tmp_path / "secret").chmod(0o600)
    monkeypatch.setenv("ZBIG_TEST_PASSWORD", SECRET)
    for where in ("env:ZBIG_TEST_PASSWORD", f"file:{tmp_path}/secret", f"command:cat '{tmp_path}/secret'"):
        tls.Credentials(own.certificate, own.key, hosts.ca.file, where).server_context()
    server = serve(path, hosts, own, tls_key_password=where)
    with server as uri, as_client(mine, hosts.ca, **{"key-password": where}):
        dz.open(uri).close()
        assert not [line for line in arguments() if SECRET.encode() in line]
        assert SECRET not in log_of(server)
    (tmp_path / "wrong").write_text("wrong")
    for where, why in (
        (None, "has a password: say where it is"),
        (SECRET, "must not be the password itself"),
        ("pass:" + SECRET, "must not be the password itself"),
        ("env:ZBIG_NONE", "no variable 'ZBIG_NONE'"),
        ("file:/no/such/file", "cannot be used: No such file"),
        (f"file:{tmp_path}/wrong", "the password is wrong"),
        ("command:false", "failed with exit code 1"),
        ("command:/no/such/command", "cannot be run: No such file"),
        ("command:echo '", "its quotes do not match"),
        (f"command:sh -c 'cat {tmp_path}/secret; exit 3'", "failed with exit code 3"),
    ):
        with pytest.raises(tls.SettingsError, match=why) as here:
            tls.Credentials(own.certificate, own.key, hosts.ca.file, where).server_context()
        with as_client(mine, hosts.ca, **{"key-password": where}), pytest.raises(DatabaseUnavailableError) as there:
            dz.open("zeo://localhost:1")
        assert str(here.value) in str(there.value).replace(mine.key, own.key).replace(mine.certificate, own.certificate)
        assert "sesame" not in everything_in(here.value) + everything_in(there.value)
    with (
        pytest.raises(ServerError, match="the password itself") as info,
        serve(path, hosts, own, tls_key_password=SECRET),
    ):
        pass
    assert "sesame" not in everything_in(info.value)


# -- the how-to


def test_the_how_tos_commands(path, tmp_path):
    """Its openssl commands make certificates that its command for the server, and its options, take."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", HOW_TO.read_text(), re.M | re.S)
    [commands] = [block for block in blocks if "openssl" in block]
    [rest] = [block.removeprefix("dask-zbig serve") for block in blocks if block.startswith("dask-zbig serve")]
    openssl("version")
    done = subprocess.run(
        ["bash", "-eu"],
        input=commands.replace("db.example.org", "localhost"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    arguments = [a.replace("db.example.org:8100", "localhost:0") for a in _command(rest)]
    assert os.stat(tmp_path / "server.key").st_mode & 0o777 == 0o600
    with subprocess.Popen(
        [sys.executable, "-m", "dask_zbig.cli.main", "serve", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            uri = server.stdout.readline().strip()
            assert uri.startswith("zeo://localhost:"), server.stderr.read()
            options = {
                f"zbig.tls.{name}": str(tmp_path / file)
                for name, file in (("ca-file", "ca.pem"), ("certificate", "client.pem"), ("key", "client.key"))
            }
            with dask.config.set(options):
                dz.open(uri).close()
        finally:
            server.terminate()
            server.communicate(timeout=120)


def _command(text):
    """The arguments of a command that may go over several lines."""
    return re.match(r"(?:.*\\\n)*.*", text)[0].replace("\\\n", " ").split()
