"""The how-to on back-ups is true: its commands make sound and consistent copies while somebody writes."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import transaction
from click.testing import CliRunner

import dask_zbig as dz
from dask_zbig.cli.main import main

HOW_TO = pathlib.Path(__file__).parents[2] / "docs" / "howto" / "backup.md"
SIZE = 300_000  # more than goes inline: each commit is a blob


def commands(word):
    """The block of the how-to with a word in it."""
    [block] = [b for b in re.findall(r"^```bash\n(.*?)^```$", HOW_TO.read_text(), re.M | re.S) if word in b]
    return block


def bash(text, directory):
    done = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input=text,
        cwd=directory,
        env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(conn, value):
    """The array and the object beside it say the same."""
    conn.root()["A"][...] = value
    conn.root()["value"] = value
    conn.transaction_manager.commit()


@pytest.fixture
def path(tmp_path):
    (tmp_path / "data").mkdir()
    path = str(tmp_path / "data" / "x.fs")
    db = dz.open(path)
    conn = db.open()
    conn.root()["A"] = dz.ZBigArray(SIZE, "u1")
    commit(conn, 1)
    conn.close()
    db.close()
    return path


def restored(directory):
    """The value in a copy that `check` finds sound, and that is whole."""
    assert "sound" in bash(commands("repozo -R"), directory)
    db = dz.open(directory / "restored" / "x.fs")
    try:
        with db.transaction() as conn:
            value = conn.root()["value"]
            assert np.all(conn.root()["A"][:] == value)
            commit(conn, 0)  # it can be used
    finally:
        db.close()
        shutil.rmtree(directory / "restored")
    return value


@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync")
def test_backups_while_somebody_writes(path, tmp_path):
    values = []
    stop = threading.Event()

    def write(uri):
        db = dz.open(uri)
        conn = db.open(transaction.TransactionManager())
        value = 1
        while not stop.is_set():
            value = value % 250 + 1
            commit(conn, value)
            values.append(value)
        conn.close()
        db.close()

    with dz.serve(path) as uri:
        writer = threading.Thread(target=write, args=(uri,))
        writer.start()
        try:
            seen = []
            while len(set(seen)) < 2 and writer.is_alive():  # until somebody has written between two of them
                before = len(values)
                bash(commands("repozo -B"), tmp_path)
                seen.append(restored(tmp_path))
                assert seen[-1] in {1, *values[max(before - 1, 0) :]}  # no older than when it began
        finally:
            stop.set()
            writer.join()
    assert len(set(seen)) > 1
    kinds = {name.rpartition(".")[2] for name in os.listdir(tmp_path / "backup" / "fs")}
    assert {"fsz", "deltafsz"} <= kinds  # the first was full, others what is new
    bash(commands("repozo -B"), tmp_path)
    assert restored(tmp_path) == values[-1]


@pytest.mark.parametrize(("first", "sound"), [("data", True), ("blobs", False)])
def test_the_order_matters(path, tmp_path, first, sound):
    """With a commit in between."""
    copy = tmp_path / "copy"
    copy.mkdir()
    steps = {
        "data": lambda: shutil.copy(path, copy / "x.fs"),
        "blobs": lambda: shutil.copytree(f"{path}.blobs", copy / "x.fs.blobs"),
    }
    steps.pop(first)()
    db = dz.open(path)
    conn = db.open()
    commit(conn, 2)
    conn.close()
    db.close()
    [last] = steps.values()
    last()
    result = CliRunner().invoke(main, ["check", str(copy / "x.fs")])
    assert (result.exit_code == 0) == sound, result.output


def test_blobs_that_came_later_are_garbage(path, tmp_path):
    """In a copy of the data file with later blobs, `gc` removes them, and new ones may have their place."""
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(path, copy / "x.fs")
    db = dz.open(path)
    conn = db.open()
    for value in (2, 3):
        commit(conn, value)
    conn.close()
    db.close()
    shutil.copytree(f"{path}.blobs", copy / "x.fs.blobs")

    def blobs():
        return sorted(str(p) for p in (copy / "x.fs.blobs").rglob("*.blob"))

    assert len(blobs()) == 3
    assert CliRunner().invoke(main, ["gc", str(copy / "x.fs"), "--old", "0"]).exit_code == 0
    assert len(blobs()) == 1
    db = dz.open(copy / "x.fs")
    with db.transaction() as conn:
        assert np.all(conn.root()["A"][:] == 1)
        commit(conn, 9)
    db.close()
    assert CliRunner().invoke(main, ["check", str(copy / "x.fs")]).exit_code == 0
