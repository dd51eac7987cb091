"""64 threads hammer one array: no wrong byte, no deadlock, and nothing left behind. See hammer.py, which does it.

ZBIG_HAMMER_SECONDS (4): how long, on each kind of database. ZBIG_HAMMER_KINDS ("filestorage,zeo,zeo-cache"): which.
ZBIG_HAMMER_SEED (0).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest

import dask_zbig as dz

pytestmark = pytest.mark.stress

SECONDS = float(os.environ.get("ZBIG_HAMMER_SECONDS", "4"))
HANG = 600  # seconds more
HAMMER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hammer.py")


@pytest.mark.parametrize("kind", os.environ.get("ZBIG_HAMMER_KINDS", "filestorage,zeo,zeo-cache").split(","))
def test_hammer(tmp_path, kind):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with contextlib.ExitStack() as stack:
        address = str(tmp_path / "x.fs")
        if kind != "filestorage":
            address = stack.enter_context(dz.serve(address, shared_blob_dir=kind == "zeo"))
        command = [sys.executable, HAMMER, address, "--seconds", str(SECONDS), "--hang", str(HANG)]
        done = subprocess.run(
            [*command, "--directory", str(tmp_path), "--seed", os.environ.get("ZBIG_HAMMER_SEED", "0")],
            cwd=tmp_path,
            env=dict(os.environ, TMPDIR=str(temporary)),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS + 2 * HANG,
        )
        assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    print(said)
    before, after = said["before"], said["after"]
    assert said["not done"] == []
    assert after["scratch files"] == before["scratch files"] == 0
    assert after["threads"] == before["threads"]
    assert after["descriptors"] <= before["descriptors"] + 2  # (what a collection has not reached yet)
    assert after["files mapped"] <= before["files mapped"] + 2
    assert after["mappings"] <= before["mappings"] + 32  # the allocator's
    assert after["kilobytes"] <= before["kilobytes"] + (96 << 10)  # threads' heaps, in pieces; however long it takes
    assert os.listdir(temporary) == []
