"""``dask-zbig demo``: the whole path, on a small mask, and once for real."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.context import SpawnProcess

import dask
import numpy as np
import psutil
import pytest
import transaction
from click.testing import CliRunner
from PIL import Image

import dask_zbig as dz
from dask_zbig.cli import demo, demo_data, demo_job, demo_report
from dask_zbig.cli.demo_check import check, compare
from dask_zbig.cli.main import main

SHAPE = (2160, 2160)


@pytest.fixture(scope="module")
def water():
    row, column = np.indices(SHAPE)
    return np.hypot(row - 700, column - 900) > 600 + 40 * np.sin(column / 50)


@pytest.fixture
def path(tmp_path, water):
    path = str(tmp_path / "mask.npz")
    np.savez_compressed(path, mask=water, lat=90 - np.arange(SHAPE[0]) / 12)
    return path


@pytest.fixture
def source(path):
    return demo_data.open_mask(path)


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """A temporary directory for the demo; afterwards it must be empty, and no process be left."""
    tmp_path_factory.getbasetemp()  # not in ours
    others = set(psutil.Process().children(recursive=True))  # of fixtures that last longer
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield directory
        assert os.listdir(directory) == []
    deadline = time.monotonic() + 60
    while left := [p for p in psutil.Process().children(recursive=True) if p not in others and counts(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def counts(process):
    """Whether it is one that must not be left: none that has just ended, nor one of Python's own."""
    try:
        return "resource_tracker" not in " ".join(process.cmdline())
    except psutil.ZombieProcess:
        return True  # nobody has waited for it
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def database(tmp_path):
    """The demo's arrays without its processes."""
    db = dz.open(tmp_path / "x.fs")
    connection = db.open()
    try:
        with dask.config.set(scheduler="threads"):
            yield connection
    finally:
        transaction.abort()
        connection.close()
        db.close()


def right_answer(source, water):
    weights = np.cos(np.radians(source.latitudes()))[:, None] * np.ones(SHAPE)
    return np.average(~water, weights=weights), [
        np.average(land, weights=w) for land, w in zip(np.split(~water, 18), np.split(weights, 18), strict=True)
    ]


def test_pieces(source, water):
    assert (source.shape, source.nbytes, source.grid) == (SHAPE, water.nbytes, (72, 72))
    pieces = list(source.pieces())
    assert [first for first, _ in pieces] == list(range(0, 2160, 60))
    np.testing.assert_array_equal(np.concatenate([p for _, p in pieces]), water)


def test_job(tmp_path, source, water):
    with database(tmp_path) as connection:
        seen = []
        demo_job.import_mask(connection, source, lambda *progress: seen.append(progress))
        assert seen[-1] == (water.nbytes, water.nbytes)
        earth, bands = demo_job.land_fractions(connection, source)
        expected = right_answer(source, water)
        assert earth == pytest.approx(expected[0], abs=1e-12)
        np.testing.assert_allclose(bands, expected[1], atol=1e-12)
        result = demo_job.save_land(connection, source, (earth, bands))
        assert result.bytes == water.nbytes + 72 * 72 * 4
        root = connection.root()
        np.testing.assert_array_equal(root["land"][:], ~water)
        assert compare(root, source, lambda done: None).none


@pytest.mark.parametrize(
    ("name", "where", "value"), [("mask", 700, True), ("land", (2159, 3), True), ("land_fraction", (7, 8), 9)]
)
def test_compare_finds_one_wrong_element(tmp_path, source, name, where, value):
    with database(tmp_path) as connection:
        root = connection.root()
        demo_job.import_mask(connection, source, lambda *_: None)
        demo_job.save_land(connection, source, demo_job.land_fractions(connection, source))
        before = np.array(root[name][where])
        root[name][where] = value
        differences = compare(root, source, lambda done: None)
        assert getattr(differences, name) == np.count_nonzero(before != value) > 0
        assert not differences.none
        transaction.abort()
        root["answer"]["earth"] += 1e-9
        assert not compare(root, source, lambda done: None).none


@pytest.mark.parametrize("kill", [False, True])
def test_run(tmp_path, source, water, capsys, kill):
    picture = str(tmp_path / "map.png")
    earth, bands = demo.run(source, kill_worker=kill, picture=picture)
    expected = right_answer(source, water)
    assert earth == pytest.approx(expected[0], abs=1e-12)
    np.testing.assert_allclose(bands, expected[1], atol=1e-12)
    out, trouble = capsys.readouterr()
    assert f"{100 * expected[0]:.1f} % of the Earth is land" in out
    assert "equal to NumPy's" in out
    assert ("killed after 24 of 72 writes" in out) == kill
    assert trouble == ""
    with Image.open(picture) as image:
        assert image.size[0] > 1440


def test_keep(tmp_path, source, water, capsys):
    directory = str(tmp_path / "kept")
    demo.run(source, keep=directory, workers=1)
    assert os.path.exists(os.path.join(directory, "dask-zbig-demo.png"))
    assert f"kept: dask_zbig.open('{directory}/earth.fs')" in capsys.readouterr().out
    db = dz.open(os.path.join(directory, "earth.fs"))
    with db.transaction() as connection:
        np.testing.assert_array_equal(connection.root()["land"][:], ~water)
    db.close()
    with pytest.raises(Exception, match="exists already"):
        demo.run(source, keep=directory)


def test_map_that_cannot_be_written_is_found_out_first(tmp_path, source):
    with pytest.raises(Exception, match="no directory that you may write to"):
        demo.run(source, picture=str(tmp_path / "none" / "map.png"))


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"mask": np.zeros((8, 8), bool)}, "no multiple"),
        ({"mask": np.zeros(SHAPE, "u1")}, "not rows of booleans"),
        ({"mask": np.zeros(SHAPE, bool), "lat": np.arange(2160.0)}, "north to south"),
        ({"other": np.zeros(3)}, "not a land mask"),
    ],
)
def test_wrong_mask_is_refused(tmp_path, members, why):
    np.savez(tmp_path / "m.npz", **members)
    with pytest.raises(Exception, match=why):
        demo_data.open_mask(str(tmp_path / "m.npz"))


@pytest.mark.parametrize("missing", ["global_land_mask", "PIL"])
def test_missing_extra(monkeypatch, missing):
    find = demo_data.importlib.util.find_spec
    monkeypatch.setattr(demo_data.importlib.util, "find_spec", lambda n, *a: None if n == missing else find(n, *a))
    result = CliRunner().invoke(main, ["demo"])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "pip install 'dask_zbig[demo]'" in result.output


def test_stopped_while_a_finalizer_runs(monkeypatch):
    """Python drops what is raised there, and says so: of this nobody need know."""

    class Garbage:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # until Python looks for signals
                pass

    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    before = sys.unraisablehook
    report = demo_report.Report()
    with demo._stoppable(report):
        Garbage()
        with pytest.raises(SystemExit) as stopped:
            report.check()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert complaints == []
    assert sys.unraisablehook is before


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_while_the_check_starts(source, monkeypatch, late):
    """It is not lost, and the process that has just been started is ended. That is not to see it."""
    start = SpawnProcess.start
    started = []

    def interrupted(process):
        if not late:
            os.kill(os.getpid(), signal.SIGINT)
        start(process)
        started.append(psutil.Process(process.pid))
        with open(f"/proc/{process.pid}/status") as status:
            [blocked] = [line.split()[1] for line in status if line.startswith("SigBlk:")]
        assert int(blocked, 16) >> (signal.SIGINT - 1) & 1
        if late:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check("memory://", source, print)
    assert not started[0].is_running()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["step", "start", "import", "save"])
def test_stopped(path, temporary, tmp_path, number, step):
    """Nothing is left, wherever it is stopped (the signal comes just after that line)."""
    script = (
        "import sys; from dask_zbig.cli import demo, demo_data\n"
        "if __name__ == '__main__': demo.run(demo_data.open_mask(sys.argv[1]), picture='map.png')"
    )
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, "-u", str(tmp_path / "run.py"), path]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stdout:
            if line.split()[:1] == [step]:
                break
        time.sleep(0.05)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, trouble = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert trouble.split("\n")[:2] == ["", "stopped, cleaning up"] or trouble.startswith("stopped, cleaning up\n")
    assert "dask_zbig" not in trouble  # (ZEO, interrupted while it waits for an answer, may complain when that comes)
    assert not os.path.exists(tmp_path / "map.png")
    assert [p for p in psutil.process_iter(["cmdline"]) if path in " ".join(p.info["cmdline"] or [])] == []


@pytest.mark.slow
def test_command(tmp_path):
    """The real thing."""
    command = [sys.executable, "-m", "dask_zbig.cli.main", "demo", "--kill-worker", "--map", "map.png"]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(os.path.abspath, filter(None, sys.path))))
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "28.9 % of the Earth is land" in done.stdout
    assert "killed after" in done.stdout
    assert os.listdir(tmp_path) == ["map.png"]
