"""The program: arguments, rounds, files."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

from benchmarks import peers
from benchmarks.measure import warm
from benchmarks.model import SIDES, Place, Skipped, sides_of
from benchmarks.rows import CASES, case_sides

# Importing them registers their sides, in this order: what changes the array that others read comes last.
for _name in ("bulk", "peers", "dasks", "large", "small", "core"):
    importlib.import_module(f"benchmarks.{_name}")

TIMEOUT = 900.0  # seconds for a side
PEERS = list(peers.CLASSES)

Found = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Measure and report, or (in a child) run one side."""
    args = _arguments()
    if args.side:
        _child(args.side, json.loads(args.place))
        return
    from benchmarks import report

    signal.signal(signal.SIGTERM, _terminated)
    if args.load:
        with open(args.load) as file:
            data = json.load(file)
    else:
        data = _measure(args)
    print(report.markdown(data) if args.markdown else report.text(data))
    failed = report.failures(data)
    if args.chart:
        from benchmarks import chart

        chart.draw(data, args.chart)
    if failed:
        sys.exit("\n".join(failed))


def _terminated(*_: object) -> None:
    """End, so that what was started and made goes too; once: who sends it to a group may send it twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("terminated")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__import__("benchmarks").__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: to see that all works")
    parser.add_argument("--only", metavar="CASE[,CASE]", help=f"these cases alone, of: {', '.join(CASES)}")
    parser.add_argument("--peers", default="all", metavar="all|none|NAMES", help=f"of {', '.join(PEERS)}; if installed")
    parser.add_argument("--rounds", type=int, help="default: 5; quick: 1")
    parser.add_argument("--peer-rounds", type=int, help="the first rounds alone have peers in them; default: all")
    parser.add_argument("--mib", type=int, help="size of large arrays, a multiple of 64; default: 1024; quick: 64")
    parser.add_argument("--directory", help="where to write; default: the temporary directory")
    parser.add_argument("--json", metavar="FILE", help="write all measurements there")
    parser.add_argument("--chart", metavar="FILE", help="draw them, .svg or .png (needs matplotlib)")
    parser.add_argument("--markdown", action="store_true", help="print the tables for a README")
    parser.add_argument("--load", metavar="FILE", help="measure nothing: report what --json wrote")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.peer_rounds = args.rounds if args.peer_rounds is None else args.peer_rounds
    args.mib = args.mib or (64 if args.quick else 1024)
    if args.mib % 64:
        parser.error("--mib must be a multiple of 64")
    args.cases = args.only.split(",") if args.only else CASES
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    names = {"all": PEERS, "none": []}.get(args.peers) if args.peers in ("all", "none") else args.peers.split(",")
    assert names is not None
    if unknown := set(names) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    args.absent = [name for name in names if importlib.util.find_spec(name) is None]
    args.peers = [name for name in names if name not in args.absent]
    return args


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    names = sides_of([name for case in args.cases for name in case_sides(case, args.peers, args.quick)])
    found: Found = {name: [] for name in names}
    for number in range(args.rounds):
        directory = tempfile.mkdtemp(prefix="zbig-bench-", dir=args.directory)
        try:
            for name in names:
                if number >= (1 if SIDES[name].once else args.peer_rounds if SIDES[name].peer else args.rounds):
                    continue
                _say(f"round {number + 1} of {args.rounds}: {name}")
                found[name].append(run(name, Place(directory, args.mib, args.quick)))
        finally:
            shutil.rmtree(directory)
        data = _data(args, number + 1, found)
        if args.json:  # after each round: a run may take long, and be ended
            with open(args.json, "w") as file:
                json.dump(data, file, indent=1)
    _say("")
    return data


def _data(args: argparse.Namespace, rounds: int, found: Found) -> dict[str, Any]:
    return {
        "mib": args.mib,
        "rounds": rounds,
        "peer_rounds": min(rounds, args.peer_rounds),
        "quick": args.quick,
        "cpus": os.cpu_count(),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "load": os.getloadavg(),
        "cases": args.cases,
        "peers": args.peers,
        "absent": args.absent,
        "durable": {name: SIDES[name].durable for name in found if not SIDES[name].peer}
        | {name: " ".join(str(peers.CLASSES[name].__doc__).split()) for name in args.peers},
        "sides": found,
    }


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def run(name: str, place: Place) -> dict[str, Any]:
    """One side, in a process of its own, when the disk has nothing else to do and memory is warm."""
    os.sync()
    warm(int((place.mib << 20) * SIDES[name].warm))
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
    command = [sys.executable, program, "--side", name, "--place", json.dumps(asdict(place))]
    # in a session of its own, which ends as a whole: a side may have workers and a server
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, errors = child.communicate(timeout=TIMEOUT)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if child.returncode:
        return {"failed": errors[-3000:]}
    return dict(json.loads(out.splitlines()[-1]))


def _child(name: str, place: dict[str, Any]) -> None:
    start = time.perf_counter()
    try:
        result = SIDES[name].run(Place(**place))
    except Skipped as e:
        result = {"skipped": str(e)}
    result["all_seconds"] = time.perf_counter() - start
    print(json.dumps(result))
