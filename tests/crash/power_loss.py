"""A script: write down all file-system calls of small commits, and open the database as every power cut may leave it.

    python power_loss.py LIBRARY DIRECTORY SCENARIO HOW MOST

HOW: `local`; `served`, by `dask-zbig serve`, whose blob directory the client shares; `uploaded`, the same with blobs
sent to it; `unsynced`: local, and nothing is synced. MOST: about so many states after each step, the same ones each
time; where there are fewer, all of them. Prints a line of JSON: the calls, how many
states, and what is wrong with some.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback

import dask
import disk
import scenarios
import transaction
import trapping
from at_each_call import child, finish, result_of, start, with_root

import dask_zbig as dz

SHOWN = 3  # of what is wrong; then it ends


class Recording:
    def __init__(self, library, directory, scenario, how):
        self.library, self.how = library, how
        self.served = how in ("served", "uploaded")
        self.scenario = scenarios.SCENARIOS.get(scenario)  # None: a database is made, with all directories
        self.top = os.path.join(directory, "disk")
        self.path = os.path.join(self.top, "new" if self.scenario is None else "db", "x.fs")
        self.log = os.path.join(directory, "log")
        self.address = os.path.join(directory, "socket")
        self.directory = directory
        tempfile.tempdir = os.path.join(self.top, "tmp")  # an array that is new has its bytes there at first
        os.makedirs(tempfile.tempdir)

    def trapped(self):
        self.view = dz.ZBigArray(1, "u1")[:]  # has the core install its handler, which must be there first
        return trapping.Trap(self.library, self.top, self.log)

    def prepared(self):
        db = dz.open(self.path)
        with_root(db, scenarios.prepare)
        db.close()

    def recorded(self):
        """Open, commit, close, in a process that is watched; returns what there is before and after."""
        if self.served:
            dask.config.set({"zbig.load-timeout": 60})  # the server is watched, too, which takes its time
        if self.how == "uploaded":
            tempfile.tempdir = self.directory  # the client's cache is not of interest
        if self.how == "unsynced":
            os.fsync = os.fdatasync = lambda fd: None
        trap = self.trapped()
        trap.arm()
        db = dz.open(self.uri() if self.served else self.path)
        conn = db.open()
        before = scenarios.content(conn.root())
        if self.scenario is None:
            scenarios.prepare(conn.root())
        else:
            work = self.scenario(conn.root())
            next(work)
            finish(work)
        trap.mark("acknowledged")
        after = scenarios.content(conn.root())
        transaction.abort()
        conn.close()
        db.close()
        trap.disarm()
        return {"before": before, "after": after}

    def uri(self):
        shared = f"?blob_dir={self.path}.blobs&shared_blob_dir=true" if self.how == "served" else ""
        return f"zeo://{self.address}{shared}"

    def serve(self):
        """The command, in this process."""
        from dask_zbig.cli.main import main

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.trapped().arm()
        main(["serve", self.path, "--socket", self.address], standalone_mode=False)

    @contextlib.contextmanager
    def server(self):
        if not self.served:
            yield
            return
        ready, out = os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(out, 1)
            child(self.serve)
        os.close(out)
        if not os.read(ready, 1):
            raise AssertionError("the server did not start")
        try:
            yield
        finally:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)

    def run(self):
        if self.scenario is not None:
            made = result_of(start(self.prepared))
            if made:
                return made
        before = disk.Disk(self.top)
        with self.server():
            states = result_of(start(self.recorded))
        return states if "error" in states else {**states, "disk": before}


def check(path, allowed):
    """What is wrong with the database, if anything."""
    try:
        db = dz.open(path)
        try:
            found = with_root(db, scenarios.content)
            if found not in allowed:
                return f"there is {found!r}"

            def use(root):
                root["k"] = 5
                transaction.commit()

            with_root(db, use)
        finally:
            db.close()
    except Exception:  # noqa: BLE001 - whatever it is, it is wrong
        return traceback.format_exc()
    return None


def main(library, directory, scenario, how, most):
    recording = Recording(library, directory, scenario, how)
    result = recording.run()
    if "error" in result:
        raise SystemExit(result["error"])
    model, before, after = result["disk"], result["before"], result["after"]
    place = os.path.join(directory, "state")
    tempfile.tempdir = directory
    path = os.path.join(place, os.path.relpath(recording.path, recording.top))
    calls = trapping.read_log(recording.log)
    allowed, seen, wrong = {before, after}, set(), []

    def look(step):
        for tree in model.states(int(most)) if len(wrong) < SHOWN else ():
            key = (disk.digest(tree), len(allowed))
            if key in seen:
                continue
            seen.add(key)
            disk.materialise(tree, place)
            problem = check(path, allowed)
            shutil.rmtree(place)
            if problem:
                wrong.append({"call": step, "why": problem, "pending": [describe(model, c) for c in model.pending]})
            if len(wrong) == SHOWN:
                return

    marked = False
    for step, call in enumerate(calls):
        if call.name == trapping.MARK:
            look(step)
            allowed, marked = {after}, True
        elif call.name in ("fsync", "fdatasync"):
            look(step)
            model.call(call)
        else:
            model.call(call)
    look(len(calls))
    assert marked
    print(json.dumps({"calls": [str(call) for call in calls], "states": len(seen), "wrong": wrong}))


def describe(model, change):
    """A change, for a person."""
    names = {id(node): path for path, node in _paths(model.root, "")}
    what = f"entries {sorted(change.entries)}" if change.entries else f"write {change.offset}+{len(change.data or b'')}"
    return f"{names.get(id(change.node), 'a file that is gone')}: {what}"


def _paths(node, path):
    yield path, node
    for name, inner in node.live.items() if node.is_directory else ():
        yield from _paths(inner, f"{path}/{name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
