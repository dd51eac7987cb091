"""The note on a downloaded file that its checksum was computed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from dask_zbig import tempfiles
from dask_zbig.storage import checked


@pytest.fixture
def file(tmp_path):
    """A descriptor of a file as ZEO leaves it; and its path."""
    path = str(tmp_path / "x.blob")
    with open(path, "wb") as new:
        new.write(b"data")
    os.chmod(path, 0o400)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.setxattr(fd, "user.zbig.test", b"")
    except PermissionError:
        pass
    except OSError:
        pytest.skip("this file system has no attributes")
    yield fd, path
    os.close(fd)


def test_it_holds_while_the_file_is_what_it_was(file):
    fd, path = file
    assert not checked.is_noted(fd, 7)
    assert checked.note(fd, os.fstat(fd), 7)
    assert checked.is_noted(fd, 7)
    assert not checked.is_noted(fd, 8)
    assert os.fstat(fd).st_mode & 0o777 == 0o400
    for _ in range(3):
        os.utime(path, (time.time(), os.stat(path).st_mtime))  # as ZEO does
        assert checked.is_noted(fd, 7)


def test_a_file_that_was_written_to_has_none(file):
    fd, path = file
    checked.note(fd, os.fstat(fd), 7)
    size = os.path.getsize(path)
    os.utime(path, (0, os.stat(path).st_mtime - 0.01))
    assert not checked.is_noted(fd, 7)
    checked.note(fd, os.fstat(fd), 7)
    os.chmod(path, 0o600)
    with open(path, "ab") as writer:
        writer.write(b"!")
    os.utime(path, ns=(0, os.fstat(fd).st_mtime_ns))
    assert os.path.getsize(path) != size
    assert not checked.is_noted(fd, 7)


def test_a_file_that_is_written_to_while_one_reads_has_none(file):
    fd, path = file
    before = os.fstat(fd)
    os.utime(path, (0, before.st_mtime + 1))
    checked.note(fd, before, 7)
    assert not checked.is_noted(fd, 7)


def test_a_copy_has_none(file, tmp_path):
    fd, path = file
    checked.note(fd, os.fstat(fd), 7)
    subprocess.run(["cp", "-a", path, str(tmp_path / "copy")], check=True)
    copy = os.open(tmp_path / "copy", os.O_RDONLY)
    assert os.getxattr(copy, "user.zbig.checked")
    assert not checked.is_noted(copy, 7)
    os.close(copy)


def test_it_does_not_outlive_the_system(file, monkeypatch):
    fd, _ = file
    checked.note(fd, os.fstat(fd), 7)
    assert tempfiles.BOOT in os.getxattr(fd, "user.zbig.checked").decode()
    monkeypatch.setattr(checked, "BOOT", "00000000")
    assert not checked.is_noted(fd, 7)


@pytest.mark.parametrize("text", [b"", b"nonsense", b"1 2 3 4 5", b"a b c d e", b"\xff 1 1 1 1"])
def test_junk_is_none(file, text):
    fd, path = file
    os.chmod(path, 0o600)
    os.setxattr(fd, "user.zbig.checked", text)
    assert not checked.is_noted(fd, 5)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_by_an_ordinary_user(tmp_path):
    """Who may not set attributes of a file with mode 0400, though it is his; nor of somebody else's."""
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"data")
    theirs.chmod(0o444)
    place = tmp_path / "place"
    place.mkdir()
    os.chown(place, 65534, 65534)
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.owner() == "root" and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    code = f"""
import os, sys
from dask_zbig.storage import checked
os.setgid(65534), os.setuid(65534)
open({str(place / "x")!r}, "w").close()
os.chmod({str(place / "x")!r}, 0o400)
fd = os.open({str(place / "x")!r}, os.O_RDONLY)
print(checked.note(fd, os.fstat(fd), 7), checked.is_noted(fd, 7), oct(os.fstat(fd).st_mode & 0o777))
fd = os.open({str(theirs)!r}, os.O_RDONLY)
print(checked.note(fd, os.fstat(fd), 7), checked.is_noted(fd, 7))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["True", "True", "0o400", "False", "False"], done.stderr
