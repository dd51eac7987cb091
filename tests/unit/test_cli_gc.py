"""The command ``dask-zbig gc``."""

from __future__ import annotations

import json
import os
import time

import pytest
import transaction
from click.testing import CliRunner
from ZODB.FileStorage import FileStorage

import dask_zbig as dz
from dask_zbig import database, tempfiles
from dask_zbig.cli.main import main
from dask_zbig.cluster.staging import ROOT_KEY, begin_job, commit_entry
from dask_zbig.segmentwriter import store_inline


def run(*args):
    return CliRunner().invoke(main, ["gc", *map(str, args)])


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A database with an expired job, a living one, and a dead process's temporary file."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    path = str(tmp_path / "x.fs")
    db = dz.open(path)
    connection = db.open(transaction.TransactionManager())
    jobs = [begin_job(database.location(db), connection) for _ in range(2)]
    for job in jobs:
        commit_entry(job, lambda own: [store_inline(None, own, b"x" * 2048)])
    connection.close()
    with db.transaction() as connection:
        connection.root()[ROOT_KEY][jobs[0].id].lease.until = time.time() - 1
    db.close()
    token = tempfiles.BOOT + "f" * 16
    for name in (f".zbig-{token}.lock", f"zbig-{token}-1-1"):
        with open(os.path.join(path + ".blobs", "tmp", name), "wb") as file:
            file.write(b"x" * 512 * name.startswith("zbig"))
    return path


def test_text(path):
    dry = run(path, "--dry-run")
    assert dry.exit_code == 0, dry.output
    *lines, last = dry.output.splitlines()
    assert [line.split()[0] for line in lines] == ["job", "file"]
    assert "1 segments, 2.00 kiB" in lines[0]
    assert lines[1].endswith("512 B")
    assert last.startswith("Would remove 1 expired jobs (2.00 kiB, which the next pack gives back)")
    assert last.endswith("and 1 temporary files (512 B).")
    wet = run(path)
    assert wet.exit_code == 0
    assert wet.output.splitlines()[-1] == last.replace("Would remove", "Removed")
    assert run(path).output.startswith("Removed 0 expired jobs")
    assert os.listdir(os.path.join(path + ".blobs", "tmp")) == []


def test_json(path):
    report = json.loads(run(path, "--json", "--dry-run").stdout)
    assert report["dry_run"] is True
    assert json.loads(run(path, "--json").stdout)["dry_run"] is False
    (job,), (file,) = report["jobs"], report["files"]
    assert (job["bytes"], job["segments"]) == (2048, 1)
    assert 0 <= job["age"] < 60
    assert (os.path.dirname(file["path"]), file["bytes"]) == (os.path.join(path + ".blobs", "tmp"), 512)
    assert json.loads(run(path, "--json").stdout) == {"dry_run": False, "jobs": [], "files": []}


def test_old(path):
    stray = os.path.join(path + ".blobs", "tmp", "BUCxxxxxxxx")
    with open(stray, "wb"):
        pass
    assert stray not in run(path).output
    assert stray in run(path, "--old", "0").output
    assert not os.path.exists(stray)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nope.fs"], 1, "no FileStorage"),
        (["nope://x"], 1, "Error: "),
        (["zeo:///nowhere/at/all?wait_timeout=1"], 1, "no ZEO server answers"),
        ([], 2, "Missing argument"),
        (["x.fs", "--old", "-1"], 2, "--old"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == code
    assert message in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == []


def test_what_the_storage_refuses(path):
    uri = f"file://{path}?read_only=true"
    result = run(uri)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ReadOnlyError")
    FileStorage(path).close()
