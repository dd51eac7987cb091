"""Records changed at random, read in a process of their own: see `tests/hostile.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = os.path.join(os.path.dirname(os.path.dirname(__file__)), "hostile.py")


def run(directory, seed, count, seconds):
    command = [sys.executable, PROGRAM, str(directory), str(seed), str(count)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=seconds, check=False)
    *seeds, last = done.stdout.splitlines()
    assert done.returncode == 0, f"seed {[*seeds, last][-1]}: status {done.returncode}\n{done.stderr[-4000:]}"
    return eval(last, {"__builtins__": {}})


# guard: extents.py `validate`, tree.py `checked`, zbigarray.py `checked_dtype`, `checked_shape`; each removed -> wrong
# bytes or another exception before seed 1500
def test_hostile_records(tmp_path):
    outcomes = run(tmp_path, 0, 100, 100)
    assert outcomes["error"] > 15, outcomes
    assert outcomes["right"] > 15, outcomes


@pytest.mark.slow
def test_many_hostile_records(tmp_path):
    """ZBIG_FUZZ_EXAMPLES: how many."""
    count = int(os.environ.get("ZBIG_FUZZ_EXAMPLES", "1000"))
    assert sum(run(tmp_path, 10_000, count, 60 + count).values()) == count
