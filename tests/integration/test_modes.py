"""Who may read what is made, and what a planted name can do."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import transaction
import ZODB
from ZODB.MappingStorage import MappingStorage

import dask_zbig as dz
from dask_zbig import tempfiles
from dask_zbig.storage.tempdir import PrivateDirectory

# Does all that makes files, and tells their modes. In a process of its own, as the umask is of the whole process.
WORK = """
import contextlib, json, os, stat, sys, tempfile
import dask, numpy as np, transaction
import dask_zbig as dz

umask, directory, temporary = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.umask(umask)
tempfile.tempdir = temporary
path, seen = os.path.join(directory, "x.fs"), {}


def look():
    for top in (directory, temporary):
        for folder, folders, names in os.walk(top):
            for name in folders + names:
                with contextlib.suppress(FileNotFoundError):  # it has gone since
                    info = os.lstat(os.path.join(folder, name))
                    kind = "d" if stat.S_ISDIR(info.st_mode) else "s" if stat.S_ISSOCK(info.st_mode) else "f"
                    seen[os.path.relpath(os.path.join(folder, name), top)] = kind, stat.S_IMODE(info.st_mode)


def work(where):
    db = dz.open(where)
    connection = db.open()
    root = connection.root()
    root["A"] = A = dz.ZBigArray(300_000)
    A[:] = np.random.default_rng(0).random(300_000)
    look()
    transaction.savepoint()
    A[5] = 1
    look()
    transaction.commit()
    look()
    A[7] = 2
    transaction.commit()
    A[:] = 3
    transaction.abort()
    del root["A"]
    root["B"] = B = dz.ZBigArray(300_000)
    B[:] = 4
    transaction.commit()
    db.pack()
    look()
    connection.close()
    db.close()
    look()


work(path)
with dz.serve(path) as uri:
    look()
    work(uri)
with dz.serve(path, shared_blob_dir=False) as uri, dask.config.set({"zbig.scratch-directory": temporary + "/a/b"}):
    work(uri)
    work(uri + "?blob_dir=" + temporary + "/cache")
print(json.dumps(seen))
"""


def modes(umask, directory, temporary):
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(umask), str(directory), str(temporary)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: (kind, mode) for name, (kind, mode) in json.loads(done.stdout).items()}


@pytest.fixture
def place(tmp_path):
    """A directory for the data, open to all, and one for what is temporary, with a short name."""
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as temporary:
        yield data, temporary


@pytest.mark.parametrize("umask", [0, pytest.param(0o077, marks=pytest.mark.slow)])
def test_what_is_made_is_private(place, umask):
    found = modes(umask, *place)
    assert {"x.fs", "x.fs.index", "x.fs.lock", "x.fs.tmp", "x.fs.oid", "x.fs.blobs", "a", "a/b", "cache"} <= set(found)
    assert any(name.startswith("x.fs.blobs/0x") and kind == "f" for name, (kind, _) in found.items())
    assert any("zbig-" in name for name in found)
    assert any(kind == "s" for kind, _ in found.values())
    private = {"x.fs.blobs", "a", "cache"}  # nobody gets into those; what is in them need not be private itself
    private |= {name for name in found if name.startswith("dz-") and "/" not in name}
    assert {found[name] for name in private} == {("d", 0o700)}
    open_to_others = {
        name: oct(mode)
        for name, (_, mode) in found.items()
        if mode & 0o077 and not any(name.startswith(folder + "/") for folder in private)
    }
    assert open_to_others == {}
    writable = {name: oct(mode) for name, (kind, mode) in found.items() if mode & 0o022 and name.startswith("x.fs")}
    assert writable == {}


@pytest.mark.parametrize("umask", [pytest.param(0, marks=pytest.mark.slow), 0o077])
def test_what_is_shared_stays_so(place, umask):
    """A group that reads the database reads what is added to it, and nobody else does."""
    data, temporary = place
    dz.open(data / "x.fs").close()
    for name in ("x.fs.index", "x.fs.lock", "x.fs.tmp"):
        (data / name).unlink()
    (data / "x.fs").chmod(0o640)
    for folder in ("x.fs.blobs", "x.fs.blobs/tmp"):
        (data / folder).chmod(0o750)
    found = modes(umask, data, temporary)
    for name, (kind, mode) in found.items():
        if "/tmp/" in name or not name.startswith("x.fs"):
            continue  # not of the database yet
        if kind == "d":
            assert mode == 0o750, name
        elif name.endswith(".blob"):
            assert mode == 0o440, name
        elif not name.endswith((".layout", ".tmp-", ".tmp")) or name == "x.fs.tmp":
            assert mode == 0o640, name


# -- planted names


@pytest.fixture
def victim(tmp_path):
    """A file that must not be touched through a link."""
    file = tmp_path / "victim"
    file.write_text("precious")
    yield file
    assert file.read_text() == "precious"
    assert stat.S_ISREG(os.lstat(file).st_mode)


def test_links_beside_the_data_file_are_not_followed(tmp_path, victim):
    path = str(tmp_path / "x.fs")
    names = [path + end for end in (".tmp", ".lock", ".index.index_tmp", ".pack", ".oid.new")]

    def plant():
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            os.symlink(victim, name)

    plant()
    db = dz.open(path)
    with db.transaction() as connection:
        connection.root()["A"] = A = dz.ZBigArray(1000)
        A[:] = 7
    for name in names[2:]:
        with contextlib.suppress(FileExistsError):
            os.symlink(victim, name)
    db.pack()
    with contextlib.suppress(FileExistsError):
        os.symlink(victim, names[2])
    db.close()
    plant()
    db = dz.open(path)
    with db.transaction() as connection:
        assert connection.root()["A"][:].sum() == 7000
    db.close()


def test_links_with_the_names_of_scratch_files_are_not_followed(tmp_path, victim, monkeypatch):
    """Nobody can guess them, but who sees one sees what the next will be."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    db = ZODB.DB(MappingStorage())
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    connection.root()["A"] = A = dz.ZBigArray(1000)
    manager.commit()
    head, number = tempfiles.new_name().rsplit("-", 1)
    planted = [
        tmp_path / f"{head}-{int(number) + i}{end}" for i in range(1, 50) for end in ("", *(f"-{n}" for n in range(5)))
    ]
    for name in planted:
        name.symlink_to(victim)
    with contextlib.suppress(dz.ScratchError):  # it may be kept from writing, but not made to write there
        A[:] = 7
    manager.abort()
    for name in planted:
        name.unlink()
    A[:] = 8
    manager.commit()
    assert np.array_equal(A[:], np.full(1000, 8.0))
    connection.close()
    db.close()


def test_links_with_the_names_of_private_directories_are_not_followed(tmp_path, victim):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".owner").write_text("")
    (folder / "precious").write_text("")
    long_ago = time.time() - 1e6
    os.symlink(folder, tmp_path / "dz-cache-abcdefgh")
    os.utime(folder, (long_ago, long_ago))
    os.utime(tmp_path / "dz-cache-abcdefgh", (long_ago, long_ago), follow_symlinks=False)
    other = tmp_path / "dz-cache-12345678"  # a directory, but with a link for its lock
    other.mkdir()
    (other / ".owner").symlink_to(victim)
    os.utime(other, (long_ago, long_ago))
    with contextlib.closing(PrivateDirectory("cache", str(tmp_path))) as made:
        assert stat.S_IMODE(os.stat(made.path).st_mode) == 0o700
    assert (folder / "precious").exists()
    assert other.exists()


def test_a_planted_lock_is_not_followed(tmp_path, victim):
    token = tempfiles.new_name().split("-")[1]
    (tmp_path / f".zbig-{token}.lock").symlink_to(victim)
    with tempfiles.Hold(str(tmp_path)):
        pass
