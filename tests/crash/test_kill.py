"""kill -9 at random moments: every acknowledged commit is there in full, no other in part, and no file is left."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.crash


@pytest.mark.parametrize("whom", ["writer", "server"])
def test_killed(whom, script, memory_disk, runs):
    (result,) = script("random_kills.py", memory_disk, whom, 25 * runs, runs)
    assert result["commits"] >= result["runs"]
