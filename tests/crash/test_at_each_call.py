"""A kill, or an error, at each file-system call of a commit: it is whole or not there, and no file is left."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.crash

SCENARIOS = ("inline", "blob", "both", "append", "resize", "savepoint", "first", "publish", "pack")
ERRORS = ("EIO", "ENOSPC", "EINTR", "full", "short")


def run(script, trap, directory, scenario, modes, step, offset):
    """The runs of a script; fails with all that is wrong with them."""
    os.makedirs(directory)
    *results, total = script("at_each_call.py", trap, directory, scenario, ",".join(modes), step, offset)
    wrong = [f"{r['mode']} {r['call']} {r['name']}: {r['error']}" for r in results if "error" in r]
    assert not wrong, f"{len(wrong)} of {len(results)} runs:\n" + "\n".join(wrong)[:8000]
    return results, total["calls"]


# guard: filestorage.py: _restore_index cuts off; with ZODB's -> left behind: x.fs.tr0
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed(scenario, script, trap, memory_disk, runs):
    step = max(1, 6 // runs)
    where = os.path.join(memory_disk, "x")
    results, calls = run(script, trap, where, scenario, ["before"], step, SCENARIOS.index(scenario))
    assert sum(r["killed"] for r in results) >= len(calls) // step - 2
    assert scenario == "pack" or "before" in {r["outcome"] for r in results}


# guard: openfile.py, sources.py: a scratch file that cannot be removed; suppress FileNotFoundError only -> the commit
# raises when it is done. filestorage.py: _blob_storeblob; ZODB's own -> left behind: a blob
@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s != "pack"])
def test_failing(scenario, script, trap, memory_disk, runs):
    step = max(1, 12 // runs)
    where = os.path.join(memory_disk, "x")
    results, _ = run(script, trap, where, scenario, ERRORS, step, SCENARIOS.index(scenario))
    assert {bool(r["raised"]) for r in results} == {True, False}


# What a kill after one call finds is what one before the next call finds, so this adds little.
def test_killed_after_a_call(script, trap, memory_disk, runs):
    where = os.path.join(memory_disk, "x")
    results, _ = run(script, trap, where, "both", ["after"], max(1, 12 // runs), 3)
    assert any(r["killed"] for r in results)
