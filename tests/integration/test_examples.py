"""The examples run, check their results by themselves, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: With arguments that make it small. (The others `.ci/run` runs, too: those start clusters, and have tests like them.)
QUICK = {"catalogue.py": [], "time_travel.py": []}
SLOW = {
    "image_stack.py": ["--frames", "16"],
    "machine_learning.py": ["--copies", "20"],
    "out_of_core.py": ["--size", "192"],
    "sea_temperature.py": [],
    "time_series.py": ["--batches", "30"],
}
NEEDS = {
    "catalogue.py": "statsmodels",
    "image_stack.py": "sklearn",
    "machine_learning.py": "sklearn",
    "sea_temperature.py": "statsmodels",
    "time_series.py": "statsmodels",
    "walkthrough.py": "statsmodels",
}


def run(name, directory, *arguments, before="", timeout=300):
    """Run an example in an empty directory, with another one for temporary files."""
    temporary = directory / "temporary"
    temporary.mkdir(exist_ok=True)
    script = str(EXAMPLES / name)
    code = f"{before}\nimport runpy; runpy.run_path({script!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, *(["-c", code] if before else [script]), *arguments],
        cwd=directory,
        env={**os.environ, "TMPDIR": str(temporary), "MPLCONFIGDIR": str(directory), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_example(tmp_path, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    done = run(name, tmp_path, *(QUICK | SLOW)[name])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) > 1
    assert "this example needs" not in done.stdout
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.fs*"))
    assert not list((tmp_path / "temporary").glob("tmp*"))


@pytest.mark.parametrize("name", [n if n == "catalogue.py" else pytest.param(n, marks=pytest.mark.slow) for n in NEEDS])
def test_an_example_says_what_it_needs(tmp_path, name):
    # one child each: importing takes longer than all the rest
    done = run(name, tmp_path, before=f"import sys; sys.modules[{NEEDS[name]!r}] = None", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "pip install 'dask_zbig[examples]'" in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.slow
def test_the_page(tmp_path):
    pytest.importorskip("statsmodels")
    pytest.importorskip("matplotlib")
    done = run("walkthrough.py", tmp_path, "--html", "page.html", timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<img ") == 4
    assert "1 TiB of zeros and 309 sunspot numbers" in page
    for number in range(1, 5):
        png = (tmp_path / f"page-{number}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 5000
