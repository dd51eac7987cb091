"""What the crash tests share: where they run, how they run their scripts, and how much of it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
RUNS = int(os.environ.get("ZBIG_CRASH_RUNS", "1"))  # how much; 12: every call, and hundreds of random moments


@pytest.fixture
def memory_disk(tmp_path):
    """A directory in memory, if there is room: no test here is about the disk, and syncing is fast there."""
    base = "/dev/shm"
    if not os.access(base, os.W_OK) or shutil.disk_usage(base).free < 200 << 20:
        base = tmp_path
    path = tempfile.mkdtemp(prefix="zbig-crash-", dir=base)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def trap(tmp_path_factory):
    """The compiled trap.c."""
    if platform.machine() != "x86_64":
        pytest.skip("trap.c knows x86-64 only")
    library = str(tmp_path_factory.mktemp("trap") / "trap.so")
    command = ["gcc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library]
    subprocess.run([*command, os.path.join(HERE, "trap.c")], check=True, timeout=60)
    return library


@pytest.fixture
def script(memory_disk):
    """Run a script of this directory; returns the lines of JSON that it printed."""

    def run(name, *arguments, seconds=1800):
        command = [sys.executable, os.path.join(HERE, name), *map(str, arguments)]
        done = subprocess.run(command, cwd=memory_disk, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stderr[-8000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture
def runs():
    """By how much to do more than CI does."""
    return RUNS
