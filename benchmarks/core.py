"""The write fault in C alone, and the import."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

from benchmarks.model import Place, Skipped, side

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@side("fault.c")
def fault_c(place: Place) -> dict[str, Any]:
    """C program csrc/tests/bench_fault.c: a write fault of 4 KiB, and a SIGSEGV that is just skipped."""
    if not shutil.which("cmake"):
        raise Skipped("needs cmake and a C compiler")
    build = place.path("c")
    configure = ["cmake", "-S", os.path.join(ROOT, "csrc"), "-B", build, "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    for command in (configure, ["cmake", "--build", build, "--target", "bench_fault", "-j2"]):
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    environment = os.environ | {"TMPDIR": place.directory}
    program = os.path.join(build, "tests", "bench_fault")
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=120, env=environment)
    return {key: float(number) for key, number in (line.split() for line in done.stdout.splitlines())}


@side("syscalls.commit", once=True)
def syscalls_commit(place: Place) -> dict[str, Any]:
    """strace -f -c: system calls of a 1 KiB append + commit, and of raw ZODB's commit: what 900 more of them add."""
    if place.quick or not shutil.which("strace"):
        raise Skipped("needs strace, and time")
    found = {}
    for name, key in (("append.view", "append"), ("commit.zodb", "zodb")):
        few, many = (_calls(place, name, quick) for quick in (True, False))
        added = {call: (many[call] - few.get(call, 0)) / 900 for call in many}
        found[f"{key}_calls"] = sum(added.values())
        found[f"{key}_syncs"] = added.get("fsync", 0) + added.get("fdatasync", 0)
    return found


def _calls(place: Place, name: str, quick: bool) -> dict[str, int]:
    with tempfile.TemporaryDirectory(dir=place.directory) as directory:
        out = os.path.join(directory, "strace")
        there = json.dumps(asdict(Place(directory, place.mib, quick)))
        program = [sys.executable, os.path.join(ROOT, "benchmarks"), "--side", name, "--place", there]
        command = ["strace", "-f", "-c", "-U", "calls,name", "-o", out, *program]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        with open(out) as lines:
            fields = [line.split() for line in lines]
        return {line[1]: int(line[0]) for line in fields if len(line) == 2 and line[0].isdigit() and line[1] != "total"}


@side("import.time")
def import_time(place: Place) -> dict[str, Any]:
    """Importing dask_zbig, and dask.array and ZODB, each in fresh processes by turns."""
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(2 if place.quick else 5):
        for key, what in (("theirs", "import dask.array, ZODB"), ("ours", "import dask_zbig")):
            code = f"import time; t = time.perf_counter(); {what}; print(time.perf_counter() - t)"
            done = subprocess.run(
                [sys.executable, "-c", code],
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
                cwd=place.directory,
            )
            found[key].append(float(done.stdout))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True, timeout=120)
    result = {key: statistics.median(seconds) for key, seconds in found.items()}
    return result | {"python": time.perf_counter() - start}
