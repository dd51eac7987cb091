"""The commands ``ls``, ``info``, ``compact`` and ``pack``, and what all commands have in common."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import subprocess
import sys

import click
import numpy as np
import pytest
import transaction
from BTrees.IOBTree import IOBTree
from BTrees.OOBTree import OOBTree
from click.testing import CliRunner
from persistent.list import PersistentList
from persistent.mapping import PersistentMapping

import dask_zbig as dz
from dask_zbig.cli import common
from dask_zbig.cli.main import main
from dask_zbig.cli.pack import _watched


def run(*args):
    return CliRunner().invoke(main, [*map(str, args)])


def ok(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def path(tmp_path):
    """A database with arrays in containers of all kinds."""
    path = str(tmp_path / "x.fs")
    db = dz.open(path)
    with db.transaction() as connection:
        root = connection.root()
        root["A"] = A = dz.ZBigArray((1000, 1000))
        A[100:200] = 5
        root["group"] = group = PersistentMapping()
        group["B"] = B = dz.ZBigArray((3, 4, 5), "i4", "F")
        B[...] = 1
        group["again"] = A
        group["up"] = root
        group["tree"] = OOBTree({"x/y": dz.ZBigArray(3, [("time", "M8[ns]"), ("value", "f8"), ("quality", "i4")])})
        group["numbers"] = IOBTree({5: dz.ZBigArray(1 << 37)})
        group["list"] = PersistentList([1, (dz.ZBigArray((), "?"),)])
        root["other"] = object
    db.close()
    return path


PATHS = ["A", "group/B", "group/tree/x/y", "group/numbers/5", "group/list/1/0"]


def test_ls(path):
    header, *lines = ok("ls", path).splitlines()
    assert header.split() == ["path", "shape", "dtype", "order", "size", "stored", "extents"]
    assert [line.split()[0] for line in lines] == PATHS
    assert lines[0].split() == ["A", "1000", "x", "1000", "float64", "C", "7.63", "MiB", "781.25", "KiB", "1"]
    assert [line.split()[0] for line in ok("ls", path, "group/tree").splitlines()[1:]] == ["group/tree/x/y"]
    assert ok("ls", path, "/group/B/").splitlines()[1].split()[0] == "group/B"


def test_ls_as_json(path):
    found = json.loads(ok("ls", path, "--json"))
    assert [row["path"] for row in found] == PATHS
    assert found[1] == {
        "path": "group/B",
        "shape": [3, 4, 5],
        "dtype": "int32",
        "order": "F",
        "size": 240,
        "stored": 240,
        "extents": 1,
    }
    assert found[4]["shape"] == []
    db = dz.open(path)
    with db.transaction() as connection:
        connection.root().clear()
    db.close()
    assert ok("ls", path) == "no arrays\n"
    assert json.loads(ok("ls", path, "--json")) == []


def test_reading_commands_need_no_lock(path):
    db = dz.open(path)
    try:
        assert ok("ls", path, "A")
        assert ok("info", path, "A")
        assert run("compact", path).exit_code == 1
        assert "open already" in run("pack", path).output
    finally:
        db.close()


def test_every_path_that_is_listed_can_be_found(path):
    with common.opened(path) as db, common.connected(db) as (connection, _):
        for name, array in common.arrays(connection):
            assert common.find_array(connection, name) is array
        assert common.find_array(connection, "group/up/group/again") is connection.root()["A"]


def test_ls_of_a_damaged_array(path):
    db = dz.open(path)
    with db.transaction() as connection:
        leaf = connection.root()["A"]._file.root
        connection.root()["group"]["B"]._file.root = leaf  # an array of 240 bytes with extents beyond: cut off
        leaf.extents = leaf.extents.copy()
        leaf.extents["stop"] = leaf.extents["start"]
        leaf._p_changed = True
    db.close()
    result = run("ls", path)
    assert result.exit_code == 1
    assert "damaged" in result.stdout
    assert result.stderr.startswith("A: FormatError")
    assert [row["path"] for row in json.loads(run("ls", path, "--json").stdout)] == PATHS


def test_info(path):
    text = ok("info", path, "A")
    for part in ("1,000 x 1,000", "float64, C order", "8000, 8 bytes, grows along axis 0", "781.25 KiB (10%)"):
        assert part in text
    (line,) = [line for line in text.splitlines() if line.startswith("  Map")]
    assert line.split("[")[1].index("@") == 7
    assert "1,024" not in text
    assert "not stored yet" not in text


def test_info_as_json(path):
    db = dz.open(path)
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    A = connection.root()["A"]
    A.unit = "K"
    A[100:102] = 7
    manager.get().note("colder")
    manager.get().setUser("ann", "")
    manager.commit()
    connection.close()
    db.close()
    found = json.loads(ok("info", path, "A", "--json"))
    assert (found["path"], found["shape"], found["stored"]) == ("A", [1000, 1000], 800_000)
    assert found["layout"] == {"itemsize": 8, "strides": [8000, 8], "major_axis": 0, "attributes": ["unit"]}
    assert found["storage"]["inline"] == {"count": 1, "bytes": 16000, "live": 16000}
    assert found["storage"]["blobs"]["live"] == 784_000
    assert found["storage"]["blobs"]["bytes"] >= 800_000
    assert found["storage"]["extents_per_leaf"] == {"leaves": 1, "mean": 2.0, "most": 2}
    last, first = found["transactions"]
    assert (last["note"], last["user"], last["objects"]) == ("colder", "ann", 2)
    assert first["note"] == ""
    assert found["tid"] == last["tid"]
    assert found["local"]["exact"]
    assert found["local"]["live"] == 784_000


def test_compact_and_pack(path):
    db = dz.open(path)
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    A = connection.root()["A"]
    for i in range(12):
        A[i * 10, :5] = i
        manager.commit()
    expected = A[:].copy()
    connection.close()
    db.close()
    (report,) = json.loads(ok("compact", path, "A", "--json"))
    assert report["segments"] == [12, 2]
    assert (report["path"], report["transactions"], report["bytes"]) == ("A", 1, 11 * 40)
    text = ok("compact", path)
    assert [line.split(":")[0] for line in text.splitlines()] == PATHS
    assert "A: nothing to join" in text
    sizes = json.loads(ok("pack", path, "--days", "0", "--json"))
    assert sizes["after"]["objects"] < sizes["before"]["objects"]
    assert sizes["after"]["blobs"] == sizes["before"]["blobs"] > 0
    assert "packed in" in ok("pack", path)
    db = dz.open(path)
    with db.transaction() as connection:
        assert np.array_equal(connection.root()["A"][:], expected)
        del connection.root()["A"]
        del connection.root()["group"]["again"]
    db.close()
    assert json.loads(ok("pack", path, "--json"))["after"]["blobs"] > 0  # of the last day
    assert json.loads(ok("pack", path, "--json", "--days", "0"))["after"]["blobs"] == 0


def test_how_far_pack_is(path):
    """By the size of the file that ZODB writes; before that, and of a server's, only that it goes on."""
    told = queue.Queue()

    class Progress:
        def wait(self):
            told.put("waiting")

        def at(self, done, total):
            told.put((done, total))

    db = dz.open(path)
    with _watched(db, Progress()):
        assert told.get(timeout=30) == "waiting"
        size = os.path.getsize(path)
        with open(path + ".pack", "wb") as file:
            file.truncate(size // 2)
        while (latest := told.get(timeout=30)) == "waiting":
            pass
        assert latest in [(0, size), (size // 2, size)]
    os.unlink(path + ".pack")
    db.close()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["ls", "nope.fs"], 1, "no FileStorage"),
        (["ls", "nope://x"], 1, "names no database"),
        (["ls", "."], 1, "' is a directory, not a FileStorage\n"),
        (["ls", "text"], 1, "/text' is not a FileStorage\n"),
        (["ls", "X", "group/nope"], 1, "nothing at 'group/nope'; there is 'B', "),
        (["ls", "X", "A/0"], 1, "nothing at 'A/0': a ZBigArray is no container"),
        (["ls", "X", "group/numbers/x"], 1, "nothing at 'group/numbers/x'"),
        (["info", "X", "group"], 1, "'group' is no ZBigArray, but a PersistentMapping"),
        (["info", "X"], 2, "Missing argument"),
        (["compact", "X", "--transaction-size", "much"], 2, "no size"),
        (["compact", "X", "--transaction-size", "0"], 2, "more than 0"),
        (["pack", "nope.fs"], 1, "no FileStorage"),
        (["pack", "X", "--days", "-1"], 2, "--days"),
        (["ls", "zeo:///nowhere/at/all?wait_timeout=1"], 1, "no ZEO server answers"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_errors_are_one_line(path, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("text")
    result = run(*[path if a == "X" else a for a in args])
    assert result.exit_code == code
    assert message in result.output
    assert len([line for line in result.stderr.splitlines() if not line.startswith(("Usage", "Try", "\n"))]) <= 2
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.output
    assert not os.path.exists("nope.fs")


def test_one_is_told_what_one_waits_for(monkeypatch):
    monkeypatch.setattr(common, "_SOON", 0.1)
    uri = "zeo:///nowhere/at/all?wait_timeout=1"
    assert "waiting for zeo" not in run("ls", uri).stderr
    shown = common.sys  # (CliRunner's standard error is none)
    monkeypatch.setattr(common, "sys", type("", (), {"stderr": type("", (), {"isatty": lambda: True})}))
    lines = run("ls", uri).stderr.splitlines()
    monkeypatch.setattr(common, "sys", shown)
    assert lines[0] == f"waiting for {uri}, as long as zbig.zeo.wait-timeout says"


@pytest.mark.parametrize("args", [["-h"], ["ls", "-h"]])
def test_help(args):
    assert ok(*args).startswith("Usage: ")


def test_what_whole_pages_hold_too_much_is_not_called_overwritten(tmp_path):
    db = dz.open(tmp_path / "x.fs")
    with db.transaction() as connection:
        connection.root()["A"] = A = dz.ZBigArray(300_001, "u1")
        A[...] = 1
    db.close()
    assert "overwritten" not in ok("info", tmp_path / "x.fs", "A")
    db = dz.open(tmp_path / "x.fs")
    with db.transaction() as connection:
        connection.root()["A"][:200_000] = 2
    db.close()
    assert re.search(r"19\d\.\d+ KiB more overwritten", ok("info", tmp_path / "x.fs", "A"))


@pytest.mark.parametrize(
    ("words", "there"),
    [(["im"], {"import"}), (["export", "--ch"], {"--chunks"}), (["import", "--format", "h"], {"hdf5"})],
)
def test_bash_completion(words, there):
    """As bash asks for it, after what the help says was evaluated."""
    env = {"COMP_WORDS": " ".join(["dask-zbig", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-c", "from dask_zbig.cli.main import main; main(prog_name='dask-zbig')"],
        env={**os.environ, **env, "_DASK_ZBIG_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == there


@pytest.mark.parametrize("args", [["-v", "ls", "nope.fs"], ["ls", "nope.fs", "--verbose"]])
def test_verbose_shows_where_it_came_from(args):
    result = run(*args)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "in opened" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: there is no FileStorage")


def test_what_libraries_log_is_not_shown(monkeypatch, tmp_path):
    """ZODB logs a traceback of what is told in one line."""
    code = (
        "import sys; from dask_zbig.cli.main import main; import dask_zbig.cli.ls as ls, logging\n"
        "@main.command()\n@__import__('click').pass_context\ndef noise(ctx): logging.getLogger('x').error('loud')\n"
        "main.get_command = lambda ctx, name: noise\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "noise"], capture_output=True, text=True, timeout=60, check=True)
    assert "loud" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code, "-v", "noise"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "loud" in done.stderr
    assert logging.lastResort is not None


def test_help_and_completion():
    text = ok("--help")
    for name in ("compact", "config", "demo", "export", "gc", "import", "info", "ls", "pack", "serve"):
        assert f"\n  {name} " in text
        assert "-v, --verbose" in ok(name, "--help")
    assert "_DASK_ZBIG_COMPLETE=bash_source" in text
    environment = dict(os.environ, _DASK_ZBIG_COMPLETE="bash_complete", COMP_WORDS="dask-zbig im", COMP_CWORD="1")
    code = "from dask_zbig.cli.main import main; main(prog_name='dask-zbig')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["plain,import"]


def test_a_command_of_dask():
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="dask_cli") if e.name == "zbig"]
    assert entry.load() is main
    assert isinstance(main, click.Group)
    assert main.name == "zbig"
    command = [sys.executable, "-m", "dask", "zbig", "ls", "nope.fs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1][:29]) == (1, "Error: there is no FileStorage"[:29])


def test_progress(monkeypatch, capsys):
    with common.Progress("work", 4 << 20, show=True) as progress:
        progress.add(1 << 20)
        progress._shown = 0.0
        progress.add(2 << 20)
        progress.add(1 << 20)
    err = capsys.readouterr().err
    assert "75%" in err
    assert "100%" in err
    assert err.endswith("\r\x1b[K")
    with common.Progress("work", 4, unit="parts", show=True) as progress:
        progress._shown = 0.0
        progress.at(3, 4)
    assert "3 of 4 parts" in capsys.readouterr().err
    with common.Progress("work", 4, show=True) as progress:
        progress.wait()
    assert re.search(r"work: \d+ s", capsys.readouterr().err)
    with common.Progress("work", 0) as progress:  # (no terminal)
        progress.add(0)
    assert capsys.readouterr().err == ""
