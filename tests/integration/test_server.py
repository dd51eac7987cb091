"""Real servers in processes of their own, and clients of them."""

from __future__ import annotations

import gc
import glob
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from urllib.parse import parse_qs, urlsplit

import dask.config
import pytest
import transaction
import ZODB
from click.testing import CliRunner
from ZEO.ClientStorage import ClientStorage
from ZODB.blob import Blob

from dask_zbig import database
from dask_zbig.cli.main import main
from dask_zbig.errors import DatabaseUnavailableError, ServerError, SnapshotError
from dask_zbig.server import serve


@pytest.fixture(autouse=True)
def _time_limit():
    def out_of_time(*_):
        raise TimeoutError("the test took too long")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(90)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path_factory, monkeypatch):
    """Give the test a temporary directory for sockets and caches, and check that it is empty afterwards."""
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


def gone(pid, seconds=20.0):
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


# --- a served database ---


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
            client.settimeout(10)
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
    with pytest.raises(KeyError, match="mine"), server:
        os.kill(server.pid, signal.SIGKILL)
        raise KeyError("mine")


def test_killed_server(path):
    server = serve(path)

    def block():
        with server as uri:
            db = database.open(uri)
            put_blob(db, "b", b"blob")
            os.kill(server.pid, signal.SIGKILL)
            assert gone(server.pid)
            with dask.config.set({"zbig.zeo.wait-timeout": 1}):
                with pytest.raises(DatabaseUnavailableError, match="no ZEO server answers"):
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
        parent.wait(20)
    assert gone(pid)
    assert not os.path.exists(os.path.dirname(urlsplit(uri).path))
    database.open(path).close()


def test_forked_children_do_not_matter(path):
    """They neither stop the server when they leave the block, nor keep it when the parent is gone."""
    end = "pid = os.fork()\n    if pid: os.waitpid(pid, 0); database.open(uri).close(); print('alive', flush=True)"
    code = "from dask_zbig import database" + SCRIPT.format(end)
    with python(code, path) as parent:
        out, _ = parent.communicate(timeout=30)
        assert out.endswith("alive\n")
    end = "if not os.fork(): print(os.getpid(), flush=True); signal.pause()\n    os.kill(os.getpid(), signal.SIGKILL)"
    with python(SCRIPT.format(end), path) as parent:
        pid = parent.stdout.readline().split()[0]
        child = parent.stdout.readline()
        parent.wait(20)
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
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


# --- its clients ---


CLIENT = """
import pickle, sys
from dask_zbig import database
where = pickle.loads(bytes.fromhex(sys.argv[1]))
db = database.database(where)
assert database.database(where) is db and database.location(db).alias == where.alias
tid = bytes.fromhex(sys.argv[2])
conn = database.open_at(db, tid)
print(conn.root()["a"], database.snapshot(conn) == tid)
"""


def test_location_in_a_spawned_process(path):
    with serve(path) as uri:
        db = database.open(uri)
        with db.transaction() as conn:
            conn.root()["a"] = 1
        tid = db.lastTransaction()
        with db.transaction() as conn:
            conn.root()["a"] = 2
        here = database.location(db)
        assert (here.uri, here.exclusive) == (uri, False)
        assert database.database(here) is db
        with python(CLIENT, pickle.dumps(here).hex(), tid.hex()) as client:
            assert client.communicate(timeout=30)[0] == "1 True\n"
        db.close()
        again = database.database(here)  # closed by its user: opened again, and kept
        assert again is not db
        assert database.database(here) is again
        again.close()


def test_exclusive_location_in_a_spawned_process(path):
    db = database.open(path)
    with python(
        CLIENT, pickle.dumps(database.location(db)).hex(), "00" * 8, stderr=subprocess.PIPE
    ) as client:
        _, trouble = client.communicate(timeout=30)
    db.close()
    assert f"FileStorage '{path}' can be opened by one process only" in trouble
    assert f"with dz.serve('{path}') as uri: db = dz.open(uri)" in trouble


def test_secret_is_not_passed_on(path):
    with serve(path) as uri:
        db = database.open(uri + "&password=sesame")
        here = database.location(db)
        assert "sesame" not in repr(here)
        with python(CLIENT, pickle.dumps(here).hex(), "00" * 8, stderr=subprocess.PIPE) as client:
            assert "zbig.database-uris" in client.communicate(timeout=30)[1]
        db.close()


def test_plain_client_is_recognised(path):
    with serve(path) as uri:
        address = urlsplit(uri).path
        plain = ZODB.DB(ClientStorage(address, blob_dir=path + ".blobs", shared_blob_dir=True))
        here = database.register(plain)
        db = database.open(uri)
        assert here == database.location(db)
        db.close()
        plain.close()
        blind = ZODB.DB(ClientStorage(address))
        with blind.transaction() as conn:
            assert not database.has_blobs(conn)  # though it says that it provides them
        blind.close()
        settings = f"server {address}\n blob-dir {path}.blobs\n shared-blob-dir true"
        text = f"<zodb>\n <zeoclient>\n {settings}\n </zeoclient>\n</zodb>\n"
        db = database.open(text)
        assert (database.location(db).alias, database.location(db).uri) == (here.alias, text)
        db.close()


def test_lagging_client_reads_a_snapshot(path):
    with serve(path) as uri:
        one, two = database.open(uri), database.open(uri)
        late = 0
        for i in range(100):
            with one.transaction() as conn:
                conn.root()["a"] = i
            tid = one.lastTransaction()
            late += two.lastTransaction() < tid
            conn = database.open_at(two, tid)
            assert conn.root()["a"] == i
            assert database.snapshot(conn) == tid
            conn.close()
        future = (int.from_bytes(one.lastTransaction(), "big") + (1 << 40)).to_bytes(8, "big")
        with pytest.raises(SnapshotError, match="no snapshot"):
            database.open_at(two, future, timeout=0.1)
        one.close()
        two.close()


def test_snapshot_that_comes_while_one_waits(path):
    with serve(path) as uri:
        one, two = database.open(uri), database.open(uri)
        wanted = (int.from_bytes(one.lastTransaction(), "big") + 1).to_bytes(8, "big")

        def commit():
            with one.transaction() as conn:
                conn.root()["a"] = 1

        timer = threading.Timer(0.3, commit)
        timer.start()
        database.open_at(two, wanted).close()
        timer.join()
        one.close()
        two.close()


def test_server_syncs_and_cleans_up_after_conflicts(path):
    with serve(path) as uri:
        one, two = database.open(uri), database.open(uri)
        put_blob(one, "b", b"0")
        managers = [transaction.TransactionManager() for _ in range(2)]
        database.open_at(two, one.lastTransaction()).close()
        conns = [db.open(manager) for db, manager in zip((one, two), managers, strict=True)]
        for i, conn in enumerate(conns):
            with conn.root()["b"].open("w") as file:
                file.write(b"%d" % i)
        managers[0].commit()
        with pytest.raises(ZODB.POSException.ConflictError):
            managers[1].commit()
        managers[1].abort()
        for conn in conns:
            conn.close()
        assert get_blob(one, "b") == b"0"
        one.close()
        two.close()
        files = [name for name in glob.glob(path + ".blobs/0x*/**/*", recursive=True) if os.path.isfile(name)]
        assert len(files) == 2  # two revisions, and nothing of the third


# --- the command ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [[], ["--address", "127.0.0.1:0"], ["--socket", "sock"]])
def test_command(path, tmp_path, number, where):
    command = [sys.executable, "-m", "dask_zbig.cli.main", "serve", path, *where]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(os.path.abspath, sys.path)))
    with (
        tempfile.TemporaryDirectory() as cwd,
        subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        uri = process.stdout.readline().strip()
        try:
            db = database.open(uri)
            put_blob(db, "b", b"blob")
            db.close()
        finally:
            process.send_signal(number)
        out, trouble = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, ""), trouble
        assert "stop with Ctrl-C" in trouble
        assert "Traceback" not in trouble
        assert os.listdir(cwd) == []
    db = database.open(path)
    assert get_blob(db, "b") == b"blob"
    db.close()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--address", "0.0.0.0:8100"], "TLS"),
        (["--address", "8100"], "HOST:PORT"),
        (["--address", "127.0.0.1:8100", "--socket", "s"], "exclude each other"),
        (["--socket", "/" + "x" * 120], "107 bytes"),
    ],
)
def test_command_refuses(path, arguments, why):
    result = CliRunner().invoke(main, ["serve", path, *arguments])
    assert result.exit_code in (1, 2)
    assert why in result.output
    assert not os.path.exists(path)


def test_command_names_what_is_wrong_with_the_file(path, tmp_path):
    db = database.open(path)
    result = CliRunner().invoke(main, ["serve", path])
    db.close()
    assert (result.exit_code, "open already" in result.output) == (1, True)
    (tmp_path / "text").write_text("no database")
    result = CliRunner().invoke(main, ["serve", str(tmp_path / "text")])
    assert (result.exit_code, "not a FileStorage" in result.output) == (1, True)


def test_help():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "serve" in result.output
