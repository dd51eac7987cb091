"""Power cuts, on a disk that writes in any order: what was acknowledged is there, all else is whole or not there.

The model of the disk, and its one assumption, are in disk.py.
"""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.crash

CASES = (
    "inline local",
    "blob local",
    "first local",
    "create local",  # the database is made, and the directories above it
    "pack local",
    "blob served",
    "blob uploaded",
)
MORE = ("savepoint local", "publish local", "append local", "resize local", "both served", "first uploaded")


def states(script, trap, directory, case, most):
    os.makedirs(directory)
    (result,) = script("power_loss.py", trap, directory, *case.split(), most)
    return result


# guard: filestorage.py: each sync in tpc_vote, `unfinished`, `_mark`; segmentwriter.py: `_sync` (with the one of
# filestorage.py: either will do, but for what is uploaded); without any of them -> states that are wrong
@pytest.mark.parametrize("case", CASES + (MORE if os.environ.get("ZBIG_CRASH_RUNS") else ()))
def test_power_loss(case, script, trap, memory_disk, runs):
    result = states(script, trap, os.path.join(memory_disk, "x"), case, 8 * runs)
    assert not result["wrong"], result["wrong"]
    assert result["states"] > 60


@pytest.mark.parametrize("case", ["inline unsynced", "blob unsynced"])
def test_the_model_bites(case, script, trap, memory_disk):
    """Where nobody syncs, a power cut does harm."""
    result = states(script, trap, os.path.join(memory_disk, "x"), case, 16)
    assert result["wrong"]
