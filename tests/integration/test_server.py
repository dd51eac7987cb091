"""Real servers in processes of their own, and clients of them."""

from __future__ import annotations

import gc
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from urllib.parse import parse_qs, urlsplit

import dask.config
import pytest
from ZODB.blob import Blob

from dask_zbig import database
from dask_zbig.errors import DatabaseUnavailableError, ServerError
from dask_zbig.server import serve


@pytest.fixture(autouse=True)
def _time_limit():
    def out_of_time(*_):
        raise TimeoutError("the test took too long")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path_factory, monkeypatch):
    """Give the test a temporary directory for sockets and caches, and check that it is empty afterwards."""
    tmp_path_factory.getbasetemp()  # where it would be without us, not in the directory that must stay empty
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield
        gc.collect()
        assert os.listdir(directory) == []


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "data" / "x.fs")


def put_blob(db, key, data):
    blob = Blob()
    with blob.open("w") as file:
        file.write(data)
    with db.transaction() as conn:
        conn.root()[key] = blob
    return db.lastTransaction()


def get_blob(db, key):
    with db.transaction() as conn, conn.root()[key].open("r") as file:
        return file.read()


def gone(pid, seconds=120.0):
    """Wait for a process that need not be our child."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)


def python(code, *args, **options):
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", code, *args], **options)


@pytest.mark.parametrize("address", [None, ("127.0.0.1", 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_blob_round_trip(path, address, shared):
    server = serve(path, address=address, shared_blob_dir=shared)
    with server as uri:
        assert uri == server.uri
        one, two = database.open(uri), database.open(uri)
        data = os.urandom(300_000)
        tid = put_blob(one, "b", data)
        database.open_at(two, tid).close()  # which syncs it
        assert get_blob(two, "b") == data
        files = {db: db.storage.loadBlob(*blob_id(db, "b")) for db in (one, two)}
        assert (files[one] == files[two]) is shared
        assert files[one].startswith(path + ".blobs/") is shared
        one.close()
        two.close()
        assert not gone(server.pid, 0)
    assert gone(server.pid, 0)
    db = database.open(path)  # the file is free again, and has the blob
    assert get_blob(db, "b") == data
    db.close()


def blob_id(db, key):
    with db.transaction() as conn:
        blob = conn.root()[key]
        blob._p_activate()
        return blob._p_oid, blob._p_serial


def test_private_and_msgpack(path):
    server = serve(path)
    with server as uri:
        address = urlsplit(uri).path
        assert stat.S_IMODE(os.stat(address).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(os.path.dirname(address)).st_mode) == 0o700
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
            client.settimeout(120)
            assert client.recv(6, socket.MSG_WAITALL) == b"\0\0\0\x02M5"  # length, msgpack, protocol 5


def test_addresses(path, tmp_path):
    with serve(path, address=("127.0.0.1", 0)) as uri:
        port = urlsplit(uri).port
        assert port
        with (
            pytest.raises(ServerError, match="in use"),
            serve(str(tmp_path / "y.fs"), address=("127.0.0.1", port)),
        ):
            pass
    place = tempfile.mkdtemp()
    sock = os.path.join(place, "s")
    with serve(path, address=sock, blob_dir=tmp_path / "blobs") as uri:
        assert urlsplit(uri).path == sock
        assert parse_qs(urlsplit(uri).query) == {
            "blob_dir": [str(tmp_path / "blobs")],
            "shared_blob_dir": ["true"],
        }
        with pytest.raises(ServerError, match="in use"), serve(str(tmp_path / "y.fs"), address=sock):
            pass
        database.open(uri).close()  # it still answers
    assert os.listdir(place) == []
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(sock)
    with serve(path, address=sock) as uri:  # a socket that nobody listens to is replaced
        database.open(uri).close()
    with open(sock, "w") as file:
        file.write("precious")
    with pytest.raises(ServerError, match="not a socket"), serve(path, address=sock):
        pass
    with open(sock) as file:
        assert file.read() == "precious"
    os.unlink(sock)
    os.rmdir(place)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.1", "example.org", "::"])
def test_other_hosts_are_refused_without_tls(path, host):
    with pytest.raises(ServerError, match="TLS"), serve(path, address=(host, 0)):
        pass
    assert not os.path.exists(path)


def test_failures_to_start(path, tmp_path):
    db = database.open(path)
    with pytest.raises(ServerError, match="open already"), serve(path):
        pass
    db.close()
    with pytest.raises(ServerError, match="is a directory") as info, serve(tmp_path):
        pass
    assert "the end of its log" in str(info.value)
    (tmp_path / "text").write_text("no database")
    with pytest.raises(ServerError, match="not a FileStorage"), serve(tmp_path / "text"):
        pass
    with pytest.raises(ServerError, match="107 bytes"), serve(path, address="/" + "x" * 120):
        pass
    with pytest.raises(ServerError, match="in a URI"), serve(path, address="/tmp/a?b"):
        pass
    with pytest.raises(ServerError, match="no sign of life"), serve(path, timeout=0.001):
        pass
    server = serve(path)  # and none of that is in the way
    with server, pytest.raises(ServerError, match="running already"):
        server.__enter__()


def test_long_temporary_directory(path, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("d" * 100)))
    with serve(path) as uri:
        assert urlsplit(uri).path.startswith("/tmp/dz-serve-")
        database.open(uri).close()


def test_an_error_in_the_block_is_what_one_sees(path):
    server = serve(path)

    def block():
        with server:
            os.kill(server.pid, signal.SIGKILL)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        block()


def test_killed_server(path):
    server = serve(path)

    def block():
        with server as uri:
            db = database.open(uri)
            put_blob(db, "b", b"blob")
            os.kill(server.pid, signal.SIGKILL)
            assert gone(server.pid)
            with (
                dask.config.set({"zbig.zeo.wait-timeout": 1}),
                pytest.raises(DatabaseUnavailableError, match="no ZEO server answers"),
            ):
                database.open(uri)
            db.close()

    with pytest.raises(ServerError, match="ended unasked, killed by SIGKILL"):
        block()
    with serve(path) as uri:
        db = database.open(uri)
        assert get_blob(db, "b") == b"blob"
        db.close()


SCRIPT = """
import os, signal, sys
from dask_zbig.server import serve
server = serve(sys.argv[1])
with server as uri:
    print(server.pid, uri, flush=True)
    {}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "input()"])
def test_server_ends_with_its_parent(path, end):
    # in the last case by a Ctrl-C of the terminal, which must not reach the server before the parent
    with python(SCRIPT.format(end), path, stderr=subprocess.DEVNULL) as parent:
        pid, uri = parent.stdout.readline().split()
        if end == "input()":
            parent.send_signal(signal.SIGINT)
        parent.wait(120)
    assert gone(pid)
    assert not os.path.exists(os.path.dirname(urlsplit(uri).path))
    database.open(path).close()


def test_forked_children_do_not_matter(path):
    """They neither stop the server when they leave the block, nor keep it when the parent is gone."""
    end = "pid = os.fork()\n    if pid: os.waitpid(pid, 0); database.open(uri).close(); print('alive')"
    code = "from dask_zbig import database" + SCRIPT.format(end)
    with python(code, path) as parent:
        out, _ = parent.communicate(timeout=120)
        assert out.endswith("alive\n")
    end = "if not os.fork(): print(os.getpid(), flush=True); signal.pause()\n    os.kill(os.getpid(), signal.SIGKILL)"
    with python(SCRIPT.format(end), path) as parent:
        pid = parent.stdout.readline().split()[0]
        child = parent.stdout.readline()
        parent.wait(120)
        assert gone(pid)
        os.kill(int(child), signal.SIGKILL)


def test_package_found_through_sys_path_only(path, tmp_path):
    """A script that has put the package on its path itself, in a directory with files named as modules."""
    root = os.path.dirname(os.path.dirname(database.__file__))
    work = tmp_path / "work"
    work.mkdir()
    (work / "json.py").write_text("raise RuntimeError('shadowed')")
    (work / "script.py").write_text(
        f"import sys; del sys.path[0]; sys.path.append({root!r})\n"
        "from dask_zbig.server import serve\nfrom dask_zbig import database\n"
        "with serve(sys.argv[1]) as uri:\n    database.open(uri).close(); print('fine')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "script.py", path],
        cwd=work,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
