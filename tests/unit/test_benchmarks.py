"""The benchmark program: what it computes from measurements, and that it runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import pytest

PLACE = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The package, found by its place: the source tree must not get onto the path."""
    spec = importlib.util.spec_from_file_location("benchmarks", PLACE / "__init__.py")
    sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    importlib.import_module("benchmarks.program")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


def data(cases, **sides):
    found = {name.replace("__", ".").replace("_", "-"): results for name, results in sides.items()}
    about = {"mib": 64, "rounds": 3, "cpus": 2, "kernel": "6", "python": "3", "load": [0.0]}
    return about | {"cases": cases, "peers": ["zarr"], "absent": [], "durable": {"x": "so"}, "sides": found}


def seconds(*values):
    return [{"seconds": value} for value in values]


def test_a_row_is_the_median_of_the_rounds_ratios():
    measured = data(["random"], random__view=seconds(3, 30, 4), random__memmap=seconds(2, 20, 4))
    (line,) = module("report").lines(measured)
    assert line == ("2,000 random 8-byte reads", "4 s", "4 s", "1.50", "[1.25 - 1.50]", "<= 1.5", "yes")


def test_a_target_is_missed_by_more():
    measured = data(["random"], random__view=seconds(1.51), random__memmap=seconds(1))
    assert module("report").lines(measured)[0][3:] == ("1.51", "", "<= 1.5", "no")


def test_sides_of_different_rounds_are_compared_by_their_medians():
    measured = data(["random"], random__view=seconds(2), random__memmap=seconds(1, 2, 9))
    assert module("report").lines(measured)[0][3] == "1.00"


def test_a_limit_has_no_reference():
    measured = data(["index"], index__hot=[{"item": 1e-6, "slice": 6e-6}])
    item, piece = module("report").lines(measured)
    assert item[1:] == ("1 us", "", "", "", "<= 2 us", "yes")
    assert (piece[1], piece[-1]) == ("6 us", "no")


def test_what_was_skipped_or_failed_has_no_row():
    measured = data(["fault", "import"], fault__c=[{"skipped": "no cmake"}], import__time=[{"failed": "ouch"}])
    report = module("report")
    assert report.lines(measured) == []
    assert "fault.c: no cmake" in report.text(measured)
    assert report.failures(measured) == ["import.time failed:\nouch"]


def test_peers_are_shown_beside_memmap_and_the_chart_takes_their_best():
    sides = {"read__view": seconds(1), "read__memmap": seconds(2), "zarr_2__read": seconds(20)}
    measured = data(["read"], **sides, zarr_64__read=seconds(40))
    assert module("report").peer_lines(measured) == [
        ["times as long as memmap", "memmap", "ours", "zarr-2", "zarr-64"],
        ["read + sum", "2 s", "0.50", "10.0", "20.0"],
    ]
    assert module("chart").best(measured) == {"read + sum": {"dask_zbig": 0.5, "zarr": 10.0}}
    assert "| read + sum | 2 s | 0.50 | 10.0 | 20.0 |" in module("report").markdown(measured)


def test_rows_name_sides_that_there_are():
    rows, sides = module("rows"), module("model").SIDES
    for case in rows.CASES:
        for name in rows.case_sides(case, ["zarr", "icechunk", "h5py", "tiledb"], quick=False):
            assert name in sides
            assert set(sides[name].needs) <= set(sides)
            assert sides[name].durable
    assert set(rows.COUNTS) <= set(sides)
    assert not [name for name in rows.case_sides("write", [], quick=False) if sides[name].peer]


def test_sides_come_with_what_they_need_in_order():
    assert module("model").sides_of(["random.view", "read.memmap"]) == [
        "write.memmap",
        "write.view",
        "read.memmap",
        "random.view",
    ]


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, **options
    )


def test_it_runs(tmp_path):
    to = tmp_path / "found.json"
    arguments = ["--quick", "--only", "index", "--peers", "none", "--directory", str(tmp_path), "--json", str(to)]
    done = run(str(PLACE), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "A[i:j], hot" in done.stdout
    found = json.loads(to.read_text())["sides"]
    assert found["index.hot"][0]["fills"] == 0
    assert found["index.hot"][0]["item"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    again = run("-m", "benchmarks", "--load", str(to), cwd=PLACE.parent)  # the source tree is in the way
    assert again.stdout == done.stdout, again.stderr


def test_what_fails_is_told(tmp_path):
    """A side whose files nobody has written."""
    place = {"directory": str(tmp_path), "mib": 64, "quick": True}
    assert "No such file" in module("program").run("read.memmap", module("model").Place(**place))["failed"]
    assert run(str(PLACE), "--only", "nonsense").returncode == 2
    assert run(str(PLACE), "--peers", "nonsense").returncode == 2


def test_when_terminated_it_leaves_nothing_behind(tmp_path):
    arguments = ["--quick", "--only", "random", "--peers", "none", "--directory", str(tmp_path)]
    with subprocess.Popen([sys.executable, str(PLACE), *arguments], stderr=subprocess.PIPE, text=True) as program:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/*")):  # what a side has made
            assert time.monotonic() < deadline
            assert program.poll() is None
            time.sleep(0.01)
        program.terminate()
        assert program.communicate(timeout=60)[1] == "terminated\n"
    assert list(tmp_path.iterdir()) == []
