"""Temporary files: a dead process's go, a living one's stay."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import subprocess
import sys
import threading
import time

import pytest

from dask_zbig import tempfiles
from dask_zbig.tempfiles import OLD, Hold, new_name, remove, sweep

OWNER = """
import os, sys, time
from dask_zbig.tempfiles import Hold, new_name
hold = Hold(sys.argv[1])
names = [new_name() for _ in range(3)]
for name in names:
    with open(os.path.join(sys.argv[1], name), "wb") as file:
        file.write(b"x" * 1000)
print(*names, flush=True)
sys.stdin.read()
if sys.argv[2:] == ["tidy"]:
    for name in names:
        os.unlink(os.path.join(sys.argv[1], name))
"""


class Owner:
    """A process that has files in a directory."""

    def __init__(self, directory, *args, code=OWNER):
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(directory), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names = sorted(self.process.stdout.readline().split())
        assert len(self.names) == 3

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.communicate(timeout=300)

    def end(self):
        self.process.communicate(timeout=300)
        assert self.process.returncode == 0


def names(directory):
    return sorted(os.listdir(directory))


def paths(found):
    return sorted(os.path.basename(file.path) for file in found)


@pytest.fixture
def later(monkeypatch):
    """Lets time pass, for ages."""

    def pass_(seconds):
        now = time.time()
        monkeypatch.setattr(tempfiles.time, "time", lambda: now + seconds)

    return pass_


def dead(directory):
    with Owner(directory) as owner:
        pass
    return owner.names


# -- a process's own


def test_names_are_never_given_twice():
    assert len({new_name() for _ in range(100)}) == 100


def test_a_lock_lasts_as_long_as_its_holds(tmp_path):
    one, two = Hold(str(tmp_path)), Hold(str(tmp_path))
    (lock,) = names(tmp_path)
    assert os.stat(tmp_path / lock).st_mode & 0o777 == 0o600
    assert lock == f".zbig-{tempfiles._own.token}.lock"
    one.release()
    one.release()
    assert names(tmp_path) == [lock]
    del two
    gc.collect()
    assert names(tmp_path) == []
    with Hold(str(tmp_path)):
        assert names(tmp_path) == [lock]
    assert names(tmp_path) == []


def test_no_descriptor_is_left_behind(tmp_path):
    before = os.listdir("/proc/self/fd")
    for k in range(3):
        (tmp_path / str(k)).mkdir()
        with Hold(str(tmp_path / str(k))), Hold(str(tmp_path / str(k))):
            pass
    assert len(os.listdir("/proc/self/fd")) <= len(before)  # (a collection may have closed others)


def test_a_hold_that_goes_while_the_tables_are_in_use(tmp_path):
    """A garbage collection comes at any time, also in a thread that has the guard."""
    hold = Hold(str(tmp_path))
    with tempfiles._own.guard:
        hold.release()
        assert len(names(tmp_path)) == 1
    with Hold(str(tmp_path / "elsewhere")):
        assert names(tmp_path) == []


def test_threads(tmp_path):
    places = [str(tmp_path / str(k)) for k in range(2)]
    for place in places:
        os.mkdir(place)
    failures = []

    def work(k):
        try:
            for n in range(200):
                place = places[(k + n) % 2]
                with Hold(place):
                    assert os.path.exists(tempfiles._own.lock_path(place))
        except BaseException as error:  # noqa: BLE001 - for the test to see
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert [names(place) for place in places] == [[], []]
    assert tempfiles._own.locks.keys().isdisjoint(places)


def test_a_directory_that_is_removed_and_made_again(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    with Hold(str(place)):
        (lock,) = names(place)
        os.unlink(place / lock)
        place.rmdir()
        place.mkdir()
        with Hold(str(place)):
            assert names(place) == [lock]
            with pytest.raises(BlockingIOError), open(place / lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert names(place) == []


@pytest.mark.parametrize("way", ["missing", "a file", "no locks"])
def test_where_no_lock_can_be_had(tmp_path, monkeypatch, way):
    place = str(tmp_path / "place")
    if way == "a file":
        open(place, "w").close()
    if way == "no locks":
        os.mkdir(place)

        def flock(fd, flags):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(tempfiles.fcntl, "flock", flock)
    with Hold(place), Hold(place):
        if way == "no locks":
            assert names(place) == []


def test_a_janitor_that_comes_before_the_new_lock_is_locked(tmp_path, monkeypatch):
    """It takes it for a dead process's, and removes it: then there must be another."""
    original, swept = fcntl.flock, []

    def flock(fd, flags):
        if not flags & fcntl.LOCK_NB and not swept:
            swept.append(None)
            token, tempfiles._own.token = tempfiles._own.token, "0" * 24
            sweep(str(tmp_path))
            tempfiles._own.token = token
            assert names(tmp_path) == []
        original(fd, flags)

    monkeypatch.setattr(tempfiles.fcntl, "flock", flock)
    with Hold(str(tmp_path)):
        assert swept
        (lock,) = names(tmp_path)
        with pytest.raises(BlockingIOError), open(tmp_path / lock) as file:
            original(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_normal_exit(tmp_path):
    with Owner(tmp_path, "tidy") as owner:
        assert len(names(tmp_path)) == 4
        owner.end()
    assert names(tmp_path) == []
    with Owner(tmp_path) as owner:
        owner.end()
    assert len(names(tmp_path)) == 4  # it left files: the next process may remove them
    assert paths(sweep(str(tmp_path))) == owner.names
    assert names(tmp_path) == []


# -- those of others


def test_the_living_and_the_dead(tmp_path):
    with Owner(tmp_path) as living:
        gone = dead(tmp_path)
        before = names(tmp_path)
        found = sweep(str(tmp_path), dry_run=True)
        assert names(tmp_path) == before
        assert paths(found) == gone
        assert [(f.bytes, f.age < 60) for f in found] == [(1000, True)] * 3
        assert paths(sweep(str(tmp_path))) == gone
        left = names(tmp_path)
        assert left[1:] == living.names
        assert left[0].startswith(".zbig-")
        assert sweep(str(tmp_path)) == []
        assert names(tmp_path) == left


def test_the_first_use_of_a_directory_sweeps_it(tmp_path):
    gone = dead(tmp_path)
    assert set(gone) < set(names(tmp_path))
    with Hold(str(tmp_path)):
        assert names(tmp_path) == [f".zbig-{tempfiles._own.token}.lock"]


def test_later_ones_do_now_and_then(tmp_path, monkeypatch):
    with Hold(str(tmp_path)):
        gone = dead(tmp_path)
        with Hold(str(tmp_path)):
            assert set(gone) < set(names(tmp_path))
        now = time.monotonic()
        monkeypatch.setattr(tempfiles.time, "monotonic", lambda: now + tempfiles.EVERY)
        with Hold(str(tmp_path)):
            assert names(tmp_path) == [f".zbig-{tempfiles._own.token}.lock"]


@pytest.mark.parametrize("kill", ["parent", "child"])
def test_a_forked_child_is_somebody_else(tmp_path, kill):
    code = """
import os, sys
from dask_zbig.tempfiles import Hold, new_name
hold = Hold(sys.argv[1])
out, inp = os.pipe()
pid = os.fork()
if pid == 0:
    hold.release()
    own = Hold(sys.argv[1])
name = new_name()
open(os.path.join(sys.argv[1], name), "w").close()
if pid == 0:
    os.write(inp, name.encode())
    os.close(inp)
    sys.stdin.read()
    os._exit(0)
os.close(inp)
theirs = os.read(out, 1000).decode()
if sys.argv[2] == "child":
    os.kill(pid, 9)
    os.waitpid(pid, 0)
print(name, theirs, pid, flush=True)
sys.stdin.read()
"""
    with Owner(tmp_path, kill, code=code) as owner:
        pid = next(n for n in owner.names if n.isdecimal())
        mine, theirs = sorted((n for n in owner.names if n != pid), key=lambda n: n.split("-")[2] == pid)
        assert len(names(tmp_path)) == 4
        if kill == "parent":
            owner.process.kill()
            owner.process.wait(60)
            assert paths(sweep(str(tmp_path))) == [mine]
        else:
            assert paths(sweep(str(tmp_path))) == [theirs]


def test_what_no_lock_speaks_for_is_judged_by_its_age(tmp_path, later):
    name = "zbig-" + "ab" * 12 + "-1-1-kept"
    for other in (name, "zbig-cache-x", "other", new_name()):
        (tmp_path / other).write_bytes(b"x")
    everything = names(tmp_path)
    assert sweep(str(tmp_path)) == []
    later(OLD - 60)
    assert sweep(str(tmp_path)) == []
    assert names(tmp_path) == everything
    later(OLD + 60)
    assert paths(sweep(str(tmp_path))) == [name]
    assert names(tmp_path) == sorted(set(everything) - {name})


def test_another_hosts_locks_say_nothing(tmp_path, later, monkeypatch):
    gone = dead(tmp_path)
    monkeypatch.setattr(tempfiles, "BOOT", "nowhere!")
    everything = names(tmp_path)
    assert sweep(str(tmp_path)) == []
    assert names(tmp_path) == everything
    later(OLD + 60)
    assert paths(sweep(str(tmp_path))) == gone
    assert names(tmp_path) == []


def test_a_file_system_without_locks(tmp_path, later, monkeypatch):
    gone = dead(tmp_path)

    def flock(fd, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tempfiles.fcntl, "flock", flock)
    assert sweep(str(tmp_path)) == []
    assert paths(sweep(str(tmp_path), old=0.0)) == gone


def test_a_lock_that_was_made_anew_while_a_janitor_looked(tmp_path, monkeypatch):
    """Another janitor had removed the first, as it was not locked yet. The second is somebody's who lives."""
    token = tempfiles.BOOT + "0" * 16
    lock = tmp_path / f".zbig-{token}.lock"
    lock.write_bytes(b"")
    (tmp_path / f"zbig-{token}-1-1").write_bytes(b"x")
    before = names(tmp_path)
    original = fcntl.flock

    def flock(fd, flags):
        lock.rename(tmp_path.parent / "gone")
        lock.write_bytes(b"")
        original(fd, flags)

    monkeypatch.setattr(tempfiles.fcntl, "flock", flock)
    assert sweep(str(tmp_path)) == []
    assert names(tmp_path) == before


@pytest.mark.parametrize("what", ["link", "fifo", "directory"])
def test_locks_that_are_none(tmp_path, what):
    """In a directory where everybody may make files."""
    token = tempfiles.BOOT + "0" * 16
    lock, victim = tmp_path / f".zbig-{token}.lock", tmp_path / f"zbig-{token}-1-1"
    victim.write_bytes(b"x")
    if what == "link":
        (tmp_path / "target").write_bytes(b"")
        lock.symlink_to(tmp_path / "target")
    elif what == "fifo":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    before = names(tmp_path)
    assert sweep(str(tmp_path)) == []
    assert names(tmp_path) == before


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give files to another user")
def test_a_lock_speaks_for_its_owners_files_only(tmp_path):
    token = tempfiles.BOOT + "0" * 16
    lock, victim = tmp_path / f".zbig-{token}.lock", tmp_path / f"zbig-{token}-1-1"
    victim.write_bytes(b"x")
    lock.write_bytes(b"")
    os.chown(lock, 12345, -1)
    assert sweep(str(tmp_path)) == []
    os.chown(victim, 12345, -1)
    assert paths(sweep(str(tmp_path))) == [victim.name]
    assert names(tmp_path) == []


def test_removing_directories(tmp_path, later):
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "f").write_bytes(b"12345")
    assert remove([str(tmp_path / "d"), str(tmp_path / "none")], 60) == []
    later(61)
    (found,) = remove([str(tmp_path / "d")], 60)
    assert found.bytes == 5
    assert names(tmp_path) == []


def test_janitors_and_processes_all_at_once(tmp_path):
    """Whose files are swept away while it holds its lock says so, and fails."""
    code = """
import os, sys, time
from dask_zbig import tempfiles
from dask_zbig.tempfiles import Hold, new_name, sweep
print("a", "b", "c", flush=True)
place, end = sys.argv[1], time.monotonic() + 3
rounds = 0
while rounds <= 20 or time.monotonic() < end:
    if rounds % 3 == 2:  # as if it were a new process
        tempfiles._in_child()
    with Hold(place):
        path = os.path.join(place, new_name())
        with open(path, "w") as file:
            file.write("mine")
        sweep(place)
        with open(path) as file:
            assert file.read() == "mine"
        if rounds % 5:
            os.unlink(path)
        else:  # it dies without cleaning up
            os.close(tempfiles._own.locks[place].fd)
            tempfiles._own.locks[place].fd = -1
            tempfiles._own.locks.clear()
            tempfiles._own.released.clear()
            tempfiles._in_child()
    rounds += 1
assert rounds > 20, rounds
"""
    with contextlib.ExitStack() as stack:
        owners = [stack.enter_context(Owner(tmp_path, code=code)) for _ in range(4)]
        for owner in owners:
            owner.end()
    sweep(str(tmp_path))
    assert names(tmp_path) == []
