"""Run the cases, interleaved, several times; print medians and ratios, and write JSON if asked to."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

SIDES = (
    *("memmap_write", "plain_write", "zbig_write", "zbig_assign", "zbig_grow"),
    *("memmap_read", "zbig_read", "memmap_append", "zbig_append", "zbig_sparse"),
)
WRITES = [side for side in SIDES if side.endswith(("_write", "_assign", "_grow"))]


def warm(size: int) -> None:
    """Touch memory: a virtual machine's first use of a host page costs several times more.

    In huge pages, which come from where the page cache will take its own.
    """
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(memory, "u1")[...] = 1


def run(side: str, directory: str, mib: int) -> dict[str, Any]:
    """One side, in a process of its own."""
    cases = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cases.py")
    command = [sys.executable, cases, side, directory, str(mib)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of 128 MiB, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="size of the array (a multiple of 64)")
    parser.add_argument("--directory", help="where to write (default: the temporary directory)")
    parser.add_argument("--json", metavar="FILE", help="write all measurements there")
    args = parser.parse_args()
    rounds, mib = (1, 128) if args.quick else (args.rounds, args.mib)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        directory = tempfile.mkdtemp(prefix="zbig-bench-", dir=args.directory)
        try:
            for side in SIDES:
                if side in WRITES:
                    warm((mib << 20) * 3)
                found[side].append(run(side, directory, mib))
        finally:
            shutil.rmtree(directory)
    report(found, mib, rounds)
    if args.json:
        with open(args.json, "w") as out:
            json.dump({"mib": mib, "cpus": os.cpu_count(), "sides": found}, out, indent=1)


def report(found: dict[str, list[dict[str, Any]]], mib: int, rounds: int) -> None:
    """The table."""

    def median(side: str, what: str = "seconds") -> float:
        return statistics.median(r[what] for r in found[side])

    print(f"{mib} MiB of float64, medians of {rounds}, both sides durable; ratio: dask_zbig / numpy.memmap\n")
    print(f"{'case':<44}{'memmap':>12}{'dask_zbig':>12}{'ratio':>8}")
    for name, case, against in (
        ("write through a view, sync every 64 MiB", "write", "write"),
        ("write by A[i:j] = x", "assign", "write"),
        ("write by A.append(x)", "grow", "write"),
        ("read + sum, fresh process, warm page cache", "read", "read"),
        ("1 KiB append + commit (memmap: 1 KiB + flush)", "append", "append"),
    ):
        ours, theirs = median(f"zbig_{case}"), median(f"memmap_{against}")
        unit, scale = ("ms", 1e3) if case == "append" else ("s", 1)
        print(f"{name:<44}{theirs * scale:>9.3f} {unit:<2}{ours * scale:>9.3f} {unit:<2}{ours / theirs:>8.2f}")
    print(f"{'1 TiB sparse: open, view, change 1, commit':<44}{'':>12}{median('zbig_sparse') * 1e3:>9.3f} ms")
    plain = median("plain_write")
    print(f"write(2) + fsync of the same: {plain:.3f} s")
    print(f"\nbytes grown by a 1 KiB append: {median('zbig_append', 'grown'):.0f}")
    for side in ("zbig_write", "zbig_assign", "zbig_grow"):
        print(f"write faults of {side}: {median(side, 'write_faults') / mib:.2f} per MiB")


if __name__ == "__main__":
    main()
