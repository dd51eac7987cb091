"""A script: do one small commit again and again, each time with a kill, or an error, at another file-system call.

    python at_each_call.py LIBRARY DIRECTORY SCENARIO MODES STEP OFFSET

MODES, with commas: before, after (killed so), EIO, ENOSPC, EINTR (one call fails), full (all writes do from there),
short (a write does half). Of the calls at which this is possible it takes every one in STEP. Prints a line of JSON for
each run, and a last one with all calls.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import scenarios
import scratch
import transaction
import trapping

import dask_zbig as dz

SECONDS = 60
AT_ONCE = 2
WRITES = ("write", "pwrite64", "writev", "fallocate", "ftruncate", "copy_file_range")
OPENS = ("open", "openat", "creat")
NAMES = ("rename", "renameat", "renameat2", "link", "linkat", "mkdir", "mkdirat")
LEGAL = {
    "EIO": (*WRITES, *OPENS, *NAMES, "fsync", "fdatasync", "close", "unlink", "unlinkat", "rmdir", "chmod"),
    "ENOSPC": (*WRITES, *OPENS, *NAMES, "fsync", "fdatasync"),
    "EINTR": ("write", "pwrite64", "fallocate", "ftruncate", *OPENS, "fsync", "fdatasync", "close"),
    "full": WRITES,
    "short": ("write", "pwrite64"),
}


class Harness:
    def __init__(self, library, directory, scenario):
        self.library, self.directory, self.mode = library, directory, None
        self.scenario = scenarios.SCENARIOS[scenario]
        self.base = os.path.join(directory, "base")
        os.makedirs(self.base)

    # -- in children

    def open(self, place):
        """A database in a copy of the one that was prepared; temporary files go below `place`, too."""
        tempfile.tempdir = os.path.join(place, "tmp")
        os.makedirs(tempfile.tempdir, exist_ok=True)
        return dz.open(os.path.join(place, "db", "x.fs"))

    def prepared(self):
        db = self.open(self.base)
        with_root(db, scenarios.prepare)
        db.close()

    def reference(self):
        """What is there before and after, and the calls in between."""
        place = os.path.join(self.directory, "reference")
        shutil.copytree(self.base, place)
        db = self.open(place)
        before = with_root(db, scenarios.content)
        log = os.path.join(self.directory, "log")
        conn, trap = self.started(db, place, log)
        work = self.begun(conn)
        trap.arm()
        finish(work)
        trap.disarm()
        after = scenarios.content(conn.root())
        conn.close()
        db.close()
        return {"before": before, "after": after}

    def started(self, db, place, log=None):
        conn = db.open()
        scenarios.content(conn.root())  # (has the core install its handler)
        return conn, trapping.Trap(self.library, place, log)

    def begun(self, conn):
        work = self.scenario(conn.root())
        next(work)
        return work

    def killed(self, place, number):
        """Commit, and be killed meanwhile. Exits with 0 if not: with 1 if that is not what was to be."""
        db = self.open(place)
        conn, trap = self.started(db, place)
        work = self.begun(conn)
        trap.arm(number, trapping.KILL_BEFORE if self.mode == "before" else trapping.KILL_AFTER)
        finish(work)
        os.write(self.acknowledge, b"!")
        conn.close()
        db.close()

    def kill(self, place, number, expected):
        got, self.acknowledge = os.pipe()
        pid = os.fork()
        if not pid:
            child(lambda: self.killed(place, number))
        os.close(self.acknowledge)
        acknowledged = bool(os.read(got, 1))
        status = os.waitpid(pid, 0)[1]
        if status not in (0, signal.SIGKILL):
            raise AssertionError(f"the child ended with {status}")
        return {"killed": bool(status), **self.verified(place, expected, acknowledged)}

    def verified(self, place, expected, acknowledged):
        """Reopen; what is there must be the state before or after, and the database must be fit for use."""
        db = self.open(place)
        found = with_root(db, scenarios.content)
        allowed = (expected["after"],) if acknowledged else (expected["before"], expected["after"])
        assert found in allowed, f"there is {found}, not {allowed}"

        def use(root):
            root["A"][7:8] = root["k"] + 50
            root["k"] += 1
            transaction.commit()

        with_root(db, use)
        assert with_root(db, lambda root: root["A"][7] == root["k"] + 49)
        dz.collect_garbage(db, old=0)
        db.pack()
        self.no_files(place, db)
        db.close()
        self.no_files(place)
        return {"outcome": "after" if found == expected["after"] else "before", "acknowledged": acknowledged}

    def no_files(self, place, db=None, but=()):
        gc.collect()  # arrays that were aborted have files while they live
        left = scenarios.unknown_files(os.path.join(place, "db"), db)
        left = [path for path in left if not os.path.basename(path).startswith(but)]
        left = [path for path in left if os.path.basename(path) not in scratch.in_use()]
        if db is None:
            left += os.listdir(os.path.join(place, "tmp"))
        assert not left, f"left behind: {left}"

    def fail(self, place, number, expected, name):
        """A call fails: the commit does, or it does not; both are whole, and the next one is good."""
        db = self.open(place)
        conn, trap = self.started(db, place)
        work = self.begun(conn)
        how = {"full": trapping.FAIL_FROM, "short": trapping.SHORT}.get(self.mode, trapping.FAIL)
        error = 0 if self.mode == "short" else getattr(errno, "ENOSPC" if self.mode == "full" else self.mode)
        trap.arm(number, how, error)
        raised = None
        try:
            finish(work)
        except Exception as e:
            if not db.storage._file.closed and not isinstance(e, OSError):
                raise
            raised = repr(e)
        finally:
            trap.disarm()
        del work
        result = {"raised": raised, "ended": db.storage._file.closed}
        if result["ended"]:
            return result  # the outcome is unknown: ZODB gives up then
        transaction.abort()
        found = scenarios.content(conn.root())
        assert found == expected["after" if raised is None else "before"], f"there is {found} after {raised}"
        transaction.abort()
        # What could not be removed is still there; and ZODB's Blob forgets its new file if closing that fails.
        left = {"close": ("BUC",), "unlink": ("zbig-", "BUC")}.get(name, ())
        self.no_files(place, db, but=(*left, ".zbig-"))  # (the last is the lock of whoever may have temporary files)
        if raised is not None:
            finish(self.begun(conn))
            assert scenarios.content(conn.root()) == expected["after"]
            transaction.abort()
        conn.close()
        self.no_files(place, db, but=left)
        db.close()
        return {**result, "acknowledged": True}

    # -- the parent

    def run(self, number, name, expected):
        place = os.path.join(self.directory, str(number))
        shutil.copytree(self.base, place)
        if self.mode in ("before", "after"):
            result = self.kill(place, number, expected)
        else:
            result = result_of(start(lambda: self.fail(place, number, expected, name)))
            if "error" not in result:
                result |= self.verified(place, expected, not result["ended"])
        shutil.rmtree(place)
        return result


def with_root(db, function):
    conn = db.open()
    try:
        return function(conn.root())
    finally:
        transaction.abort()
        conn.close()


def finish(work):
    """The watched part."""
    for _ in work:
        raise AssertionError("one yield")
    transaction.commit()


def child(function):
    """Be a forked child that does just this; the result goes to the exit code."""
    signal.alarm(SECONDS)
    try:
        function()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - this process ends here
        traceback.print_exc()
    finally:
        os._exit(1)


def start(function):
    """Have a forked child do it. Returns its pid, and where its answer comes."""
    answer, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, answer
    os.close(answer)

    def reply():
        with open(write, "w") as file:
            try:
                json.dump(function(), file)
            except BaseException:  # noqa: BLE001 - the parent is told
                json.dump({"error": traceback.format_exc()}, file)

    child(reply)
    return None


def result_of(started):
    pid, answer = started
    with open(answer) as file:
        text = file.read()
    status = os.waitpid(pid, 0)[1]
    return json.loads(text) if text else {"error": f"ended with status {status}"}


def main(library, directory, scenario, modes, step, offset):
    gc.freeze()  # what is imported need not be looked at by each child
    harness = Harness(library, directory, scenario)
    made = result_of(start(harness.prepared))
    expected = made or result_of(start(harness.reference))
    if "error" in expected:
        raise SystemExit(expected["error"])
    calls = [call.name for call in trapping.read_log(os.path.join(directory, "log"))]
    for harness.mode in modes.split(","):
        kills = harness.mode in ("before", "after")
        numbers = [n for n, name in enumerate(calls, 1) if kills or name in LEGAL[harness.mode]]
        several(harness, expected, calls, numbers[int(offset) % int(step) :: int(step)])
    print(json.dumps({"calls": calls}))


def several(harness, expected, calls, numbers):
    """Some runs, AT_ONCE at a time."""
    running = []
    while numbers or running:
        while numbers and len(running) < AT_ONCE:
            n = numbers.pop(0)
            running.append((n, start(lambda n=n: harness.run(n, calls[n - 1], expected))))
        n, started = running.pop(0)
        line = {"mode": harness.mode, "call": n, "name": calls[n - 1], **result_of(started)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
