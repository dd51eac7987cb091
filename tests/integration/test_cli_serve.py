"""The command ``dask-zbig serve``."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile

import pytest
from click.testing import CliRunner
from ZODB.blob import Blob

from dask_zbig import database
from dask_zbig.cli.main import main


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
        out, trouble = process.communicate(timeout=120)
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
        (["--address", "0.0.0.0:8100", "--tls-certificate", "server.pem"], "those of its clients"),
        (["--address", "127.0.0.1:8100", "--tls-clients", "ca.pem"], "its certificate is not given"),
        (["--address", "0.0.0.0:8100", "--tls-certificate", "none", "--tls-clients", "none"], "No such file"),
        (["--tls-certificate", "none", "--tls-clients", "none"], "TLS is for TCP"),
    ],
)
def test_command_refuses(path, arguments, why):
    result = CliRunner().invoke(main, ["serve", path, *arguments])
    assert result.exit_code in (1, 2)
    assert why in result.output
    assert not os.path.exists(path)


def test_command_warns_of_what_is_insecure(path):
    command = [sys.executable, "-m", "dask_zbig.cli.main", "serve", path, "--address", "0.0.0.0:0", "--insecure"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        uri = process.stdout.readline().strip()
        process.terminate()
        _, trouble = process.communicate(timeout=120)
    assert uri.startswith(f"zeo://{socket.getfqdn()}:")
    assert "blob_dir" not in uri
    assert "INSECURE: whoever can reach 0.0.0.0:0" in trouble


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
