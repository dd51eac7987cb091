"""`check`: finds every array, reads every byte, names all that is damaged, and is never misled by it."""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
from collections import OrderedDict
from datetime import datetime
from fractions import Fraction

import numpy as np
import pytest
import transaction
import ZODB
from BTrees.IOBTree import IOBTree
from BTrees.OOBTree import OOBTree, OOTreeSet
from click.testing import CliRunner
from persistent import Persistent
from persistent.list import PersistentList
from persistent.mapping import PersistentMapping
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64

import dask_zbig as dz
from dask_zbig.cli.main import main
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.packing import SEGMENT
from dask_zbig.storage.segment import InlineSegment, SegmentRef, checksum
from dask_zbig.storage.tree import ExtentLeaf

from tests.conftest import open_clients  # isort: skip

BIG = 256 << 10


class Model(Persistent):
    """Somebody's class, with an array inside."""


class Special(dz.ZBigArray):
    """A subclass."""


def fill(root):
    root["A"] = A = dz.ZBigArray((64, 8192), "u1")
    A[:32] = np.arange(8192) % 251 + 1  # a blob
    root["group"] = PersistentMapping({"B": dz.ZBigArray((3, 5), "i4", order="F")})
    root["group"]["B"][...] = 7  # inline


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "x.fs")
    db = dz.open(path)
    with db.transaction() as connection:
        fill(connection.root())
    db.close()
    return path


def blobs(path):
    return sorted(p for p in glob.glob(path + ".blobs/**", recursive=True) if p.endswith(".blob"))


def change(path, change):
    """Write what must not be into the database: `change(root)` is called in a transaction."""
    db = dz.open(path)
    with db.transaction() as connection:
        change(connection.root())
    db.close()


def the(report):
    (damage,) = report.damages
    return damage


# -- what is sound


@pytest.mark.parametrize("kind", ["filestorage", "blobless", "mapping", "zeo", "zeo-cache", "demo"])
def test_sound(tmp_path, request, kind):
    with open_clients(kind, str(tmp_path), request) as clients:
        with clients.db.transaction() as connection:
            fill(connection.root())
        seen = []
        report = dz.check(clients.db, progress=lambda done, path: seen.append((done, path)))
        assert report.sound, report
        assert (report.arrays, report.leaves, report.bytes) == (2, 2, 32 * 8192 + 60)
        assert {path for _, path in seen} == {"A", "group/B"}
        assert seen[-1][0] == max(done for done, _ in seen)
        if kind == "zeo-cache":  # what was fetched for this is not kept
            other = clients.database(other=True)
            assert dz.check(other).bytes == report.bytes
            assert not glob.glob(other.storage.fshelper.base_dir + "/**/*.blob", recursive=True)
            with other.transaction() as connection:
                assert connection.root()["A"][31, 8191] == 8191 % 251 + 1


def test_a_path_and_a_uri(path, zeo_cache_server):
    before = {name: os.stat(name).st_mtime_ns for name in glob.glob(path + "*")}
    assert dz.check(path).arrays == 2
    assert dz.check(f"file://{path}?read_only=true").arrays == 2
    assert {name: os.stat(name).st_mtime_ns for name in glob.glob(path + "*")} == before
    db = dz.open(path)  # a file that is open elsewhere
    assert dz.check(path).sound
    assert dz.check(db).sound
    db.close()
    assert dz.check(zeo_cache_server).sound
    with pytest.raises(dz.DatabaseUnavailableError, match="no FileStorage"):
        dz.check(path + ".not")
    with pytest.raises(dz.DatabaseURIError):
        dz.check("nope://x")


def test_arrays_are_found_wherever_they_are(path):
    """And named by the keys that lead there."""

    def change_(root):
        model = root["model"] = Model()
        model.weights = dz.ZBigArray(3)
        model.more = {"x": [dz.ZBigArray(3)]}
        root["tree"] = tree = OOBTree()
        for k in range(300):  # several buckets
            tree[f"k{k}"] = k
        tree["k7"] = dz.ZBigArray(3)
        root["numbers"] = IOBTree({5: dz.ZBigArray(3)})  # its only bucket is in it
        root["list"] = PersistentList([1, (dz.ZBigArray(3),)])
        special = root["special"] = Special(3)
        special.other = dz.ZBigArray(3)
        root["set"] = OOTreeSet(["a", "b"])
        mixed = [dz.ArrayRef(root["A"][3:5]), np.arange(3), datetime.now(), {1, 2}, frozenset(), 1j, b"x", None]
        root["odd"] = PersistentMapping({"deep": OrderedDict(a=dz.ZBigArray(3)), "mixed": mixed, 7: Fraction(1, 3)})
        root["loop"] = root["group"]
        root["group"]["up"] = root["group"]
        for obj in (
            root["odd"]["deep"]["a"],
            model.weights,
            model.more["x"][0],
            tree["k7"],
            root["numbers"][5],
            special,
            special.other,
        ):
            obj[0] = 1

    change(path, change_)
    names = set()
    report = dz.check(path, progress=lambda done, path: names.add(path))
    assert report.sound
    expected = {"A", "group/B", "model/weights", "model/more/x/0", "tree/k7", "numbers/5", "list/1/0", "special"}
    expected |= {"special/other", "odd/deep/a"}
    assert {name.replace("loop/", "group/") for name in names} == expected
    assert report.arrays == len(expected)


def test_classes_need_not_be_importable(path):
    """Nor does anything in the database run."""
    script = f"""if True:
        import sys, types, transaction
        import dask_zbig as dz
        from persistent import Persistent
        module = sys.modules["gone"] = types.ModuleType("gone")
        class Gone(Persistent): pass
        class Kept(dz.ZBigArray): pass
        class Trap:
            def __reduce__(self):
                import os
                return os.mkdir, ({path + ".trap"!r},)
        for cls in (Gone, Kept):
            cls.__module__, cls.__qualname__ = "gone", cls.__name__
            setattr(module, cls.__name__, cls)
        db = dz.open({path!r})
        with db.transaction() as connection:
            connection.root()["gone"] = gone = Gone()
            gone.array = Kept(10)
            gone.array[:] = 5
            gone.trap = Trap()
        db.close()
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    names = set()
    assert dz.check(path, ["gone"], progress=lambda done, path: names.add(path)).sound
    assert names == {"gone/array"}
    assert not os.path.exists(path + ".trap")


def test_only_some_paths(path):
    assert dz.check(path, ["group"]).bytes == 60
    assert dz.check(path, ["/group/B/", "A"]).arrays == 2
    for wrong in ("grou", "A/x", "nothing"):
        with pytest.raises(dz.NotStoredError, match=wrong):
            dz.check(path, ["A", wrong])


def test_the_past(path):
    db = dz.open(path)
    tid = db.lastTransaction()
    with db.transaction() as connection:
        connection.root()["A"][:] = 255
        connection.root()["C"] = dz.ZBigArray(5)
    assert dz.check(db).bytes == 64 * 8192 + 60
    report = dz.check(db, at=tid)
    assert (report.snapshot, report.arrays, report.bytes) == (tid.hex(), 2, 32 * 8192 + 60)
    with pytest.raises(dz.SnapshotError):
        dz.check(db, at=b"yesterday")
    db.close()


# -- damaged segments


def truncate(file):
    os.truncate(file, BIG - 1)


def lengthen(file):
    os.truncate(file, BIG + 1)


def flip(file):
    with open(file, "r+b") as f:
        f.seek(BIG - 7)
        byte = f.read(1)[0]
        f.seek(BIG - 7)
        f.write(bytes([byte ^ 1]))


def replace_by_directory(file):
    os.unlink(file)
    os.mkdir(file)


def replace_by_pipe(file):
    os.unlink(file)
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, f"has {BIG - 1} bytes where {BIG} were stored"),
        (lengthen, f"has {BIG + 1} bytes where {BIG} were stored"),
        (flip, "checksum"),
        (os.unlink, "cannot open"),
        (replace_by_directory, "no ordinary file"),
        (replace_by_pipe, "no ordinary file"),
    ],
)
def test_damaged_blob(path, damage, problem):
    (file,) = blobs(path)
    os.chmod(file, 0o600)
    damage(file)
    report = dz.check(path)
    assert not report.sound
    assert report.arrays == 2
    assert report.bytes == 60 + (BIG if damage is flip else 0)  # it went on
    found = the(report)
    assert (found.path, found.kind, found.start, found.stop, found.elements) == ("A", "segment", 0, BIG, "[0:32]")
    assert problem in found.problem
    assert found.oid in found.problem


def test_a_damaged_segment_in_several_places(path):
    """Each is named, and the segment is read once."""

    def change_(root):
        root["C"] = C = dz.ZBigArray((2, LEAF_BYTES // 8, 8), "u1", order="C")
        C[0, -BIG:] = 1  # ends at a border of leaves
        C[1, :BIG] = 1

    change(path, change_)
    sound = dz.check(path, ["C"])
    for file in blobs(path)[1:]:
        os.chmod(file, 0o600)
        flip(file)
    report = dz.check(path, ["C"])
    assert (report.segments, report.bytes) == (sound.segments, sound.bytes)
    spans = sorted((d.start, d.stop) for d in report.damages)
    assert spans == [(LEAF_BYTES - 8 * BIG, LEAF_BYTES), (LEAF_BYTES, LEAF_BYTES + 8 * BIG)]
    assert sorted(d.elements for d in report.damages) == ["[0:1]", "[1:2]"]


def test_damaged_inline_segment(path):
    def change_(root):
        B = root["group"]["B"]
        (_, leaf) = next(iter(B._file.leaves(0, 60)))
        leaf.refs[0].obj.data = b"\7\0\0\0" * 14 + b"\7\0\0\1"

    change(path, change_)
    found = the(dz.check(path))
    assert (found.path, found.kind, found.start, found.stop) == ("group/B", "segment", 0, 60)
    assert found.elements == "[..., 0:5]"
    assert "checksum" in str(found)


# -- damaged objects


def record_of(path, find):
    """The record of an object, as stored: (place in the file, record)."""
    db = dz.open(path)
    with db.transaction() as connection:
        oid = find(connection.root())._p_oid
    record, _ = db.storage.load(oid)
    db.close()
    with open(path, "rb") as file:
        data = file.read()
    assert data.count(record) == 1
    return oid, data.index(record), record


def leaf_of(array):
    def find(root):
        ((_, leaf),) = root[array]._file.leaves(0, LEAF_BYTES)
        return leaf

    return find


@pytest.mark.parametrize(
    ("find", "place", "kind", "start"),
    [
        (lambda root: root["A"], "A", "object", None),
        (lambda root: root["A"]._file, "A", "object", None),
        (leaf_of("A"), "A", "map", 0),
    ],
)
@pytest.mark.parametrize("how", ["junk", "truncated", "class"])
def test_damaged_record(path, find, place, kind, start, how):
    oid, at, record = record_of(path, find)
    if how == "junk":
        new = b"\xff" * len(record)
    elif how == "truncated":
        new = record[: len(record) // 2].ljust(len(record), b".")
    else:
        new = record.replace(b"dask_zbig.", b"bask_zbig.", 1)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(new)
    os.path.exists(path + ".index") and os.unlink(path + ".index")
    found = the(dz.check(path))
    assert (found.path, found.oid) == (place, f"0x{int.from_bytes(oid, 'big'):x}"), found
    if how == "junk":
        assert (found.kind, found.start) == (kind, start)
        assert "cannot be read" in found.problem
    elif how == "class":
        assert "is a bask_zbig." in found.problem


def test_missing_objects(tmp_path):
    """Named, one by one, with what is still to be had of the rest."""
    db = ZODB.DB(None)
    with db.transaction() as connection:
        fill(connection.root())
        connection.root()["C"] = C = dz.ZBigArray((1 << 20, 1 << 10), "u1")
        C[:100] = C[-100:] = 1
    with db.transaction() as connection:
        C = connection.root()["C"]
        node = C._file.root
        lost = {leaf_of("A")(connection.root())._p_oid: "A", node.children[15]._p_oid: "C"}
        lost[connection.root()["group"]["B"]._p_oid] = "group/B"
    for oid in lost:
        del db.storage._data[oid]
    report = dz.check(db)
    assert {d.path: (d.kind, d.start, d.stop, d.elements) for d in report.damages} == {
        "A": ("map", 0, 64 * 8192, "[0:64]"),
        "C": ("map", 15 * LEAF_BYTES, 16 * LEAF_BYTES, f"[{15 << 16}:{16 << 16}]"),
        "group/B": ("object", None, None, ""),
    }
    assert all("missing" in str(d) for d in report.damages)
    assert report.bytes == 200 << 10
    with pytest.raises(dz.NotStoredError, match=r"but object .* is missing"):
        dz.check(db, ["group/B/x"])
    db.close()


def as_rows(leaf):
    """A leaf's state as version 1 has it, which can say what it likes."""
    table = np.array([(r.length, r.checksum) for r in leaf.refs], SEGMENT).tobytes()
    return (1, leaf.extents.tobytes(), table, tuple(r.obj for r in leaf.refs), b"", b"")


def bad_leaf(*rows, length=10, oid=None):
    """A change that makes the leaf of A say these extents."""

    def change_(root):
        leaf = leaf_of("A")(root)
        segment = InlineSegment(b"0123456789")
        leaf._p_jar.add(segment)
        leaf.refs = (SegmentRef(segment, length, checksum(b"0123456789")),)
        leaf.extents = np.array(list(rows), ex.EXTENT)
        leaf._p_changed = True

    return change_


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(0, 10, 0, 0), (5, 9, 0, 0)], "overlaps|not sorted"),
        ([(8, 10, 0, 0), (0, 2, 0, 0)], "not sorted"),
        ([(5, 5, 0, 0)], "empty"),
        ([(0, 11, 0, 0)], "beyond its segment"),
        ([(0, 5, 0, 2**64 - 2)], "beyond its segment"),
        ([(0, 5, 3, 0)], "none of the 1 segments"),
        ([(LEAF_BYTES - 5, LEAF_BYTES + 5, 0, 0)], "outside"),
        ([(LEAF_BYTES, LEAF_BYTES + 5, 0, 0)], "is leaf 0 of its file"),
        ([(2**64 - 10, 2**64 - 5, 0, 0)], "is leaf 0 of its file"),
    ],
)
def test_hostile_leaf(path, monkeypatch, rows, problem):
    monkeypatch.setattr(ExtentLeaf, "__getstate__", as_rows)
    change(path, bad_leaf(*rows))
    report = dz.check(path)
    found = the(report)
    assert (found.path, found.kind, found.start, found.stop) == ("A", "map", 0, 64 * 8192)
    assert re.search(problem, found.problem), found
    assert report.bytes == 60
    db = dz.open(path)
    with db.transaction() as connection, pytest.raises(dz.FormatError, match=problem):
        connection.root()["A"][:]
    db.close()


def test_hostile_map(path):
    """Nodes in each other's places, and in their own."""

    def change_(root):
        C = root["C"] = dz.ZBigArray(1 << 37, "u1")
        C[:100] = C[LEAF_BYTES * 1024 :][:100] = 1

    def spoil(root):
        top = root["C"]._file.root
        assert top.level == 2
        top.put(1, top)
        top.put(1023, top.children[0])

    change(path, change_)
    change(path, spoil)
    report = dz.check(path)
    assert [(d.path, d.kind, d.start) for d in report.damages] == [
        ("C", "map", 1 << 36),
        ("C", "map", 1023 << 36),  # beyond the array
    ]
    problems = [d.problem for d in report.damages]
    assert "in the place of one of level 1" in problems[0]
    assert "is leaf" in problems[1]


def test_hostile_array(path):
    change(path, lambda root: setattr(root["A"], "_shape", (-3,)))
    report = dz.check(path)
    found = the(report)
    assert (found.path, found.kind) == ("A", "array")
    assert "shape" in found.problem
    assert report.bytes == BIG + 60  # its bytes are looked at all the same
    db = dz.open(path)
    for use in (lambda A: A.shape, lambda A: A[0], lambda A: A.resize(3), repr):
        with db.transaction() as connection, pytest.raises(dz.FormatError, match="shape"):
            use(connection.root()["A"])
    db.close()


def test_a_future_version(path):
    def change_(root):
        leaf = leaf_of("A")(root)
        state = leaf.__getstate__()
        leaf.__class__.__getstate__ = lambda self: (3, *state[1:])
        leaf._p_changed = True

    original = ExtentLeaf.__getstate__
    try:
        change(path, change_)
    finally:
        ExtentLeaf.__getstate__ = original
    assert "written by a newer dask_zbig" in the(dz.check(path)).problem


def test_a_segment_that_is_no_segment(path):
    """A leaf that refers to something else, or to a segment of another kind."""
    db = dz.open(path)
    with db.transaction() as connection:
        root = connection.root()
        leaf = leaf_of("A")(root)
        ghost = InlineSegment.__new__(InlineSegment)
        oid = root["group"]._p_oid
        ghost._p_oid = oid
        ghost._p_jar = connection
        leaf.refs = (SegmentRef(ghost, BIG, 0),)
        leaf._p_changed = True
    found = the(dz.check(db))
    assert "PersistentMapping" in found.problem
    with db.transaction() as connection, pytest.raises(dz.LoadError, match="PersistentMapping"):
        connection.root()["A"].prefetch()
    db.close()


# -- while others are at work


def test_what_is_packed_meanwhile_is_no_damage(path):
    db = dz.open(path)
    packed = []

    def progress(done, where):
        if not packed:
            packed.append(1)
            with db.transaction() as connection:
                connection.root()["A"][:] = 3
            db.pack()

    assert dz.check(db, progress=progress).sound
    assert packed
    db.close()


def test_a_server_that_is_gone_is_no_damage(tmp_path):
    import dask

    with dz.serve(str(tmp_path / "x.fs"), shared_blob_dir=False) as uri:
        db = dz.open(uri)
        db.storage._server.timeout = 1  # from now on: how long to wait for the server
        with db.transaction() as connection:
            fill(connection.root())
    with dask.config.set({"zbig.load-timeout": 0.2}), pytest.raises(dz.DatabaseUnavailableError):
        dz.check(db)
    db.close()


# -- the command


def run(*args):
    return CliRunner().invoke(main, ["check", *map(str, args)])


def test_command(path):
    result = run(path)
    assert result.exit_code == 0
    assert result.output.startswith("2 arrays, 2 segments, 256.06 kiB as of transaction 0x")
    assert result.output.endswith(": sound\n")
    (file,) = blobs(path)
    os.unlink(file)
    result = run(path)
    assert result.exit_code == 1
    damage, last = result.output.splitlines()
    assert damage.startswith("segment 0x")
    assert "A[0:32], bytes 0..262144: cannot open the file" in damage
    assert last.endswith(": 1 DAMAGED")
    assert run(path, "group").exit_code == 0
    report = json.loads(run(path, "--json").stdout)
    assert report["sound"] is False
    assert report["damages"][0]["elements"] == "[0:32]"
    assert json.loads(run(path, "group/B", "--json").stdout)["damages"] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nope.fs"], "no FileStorage"),
        (["nope://x"], "Error: "),
        (["zeo:///nowhere/at/all?wait_timeout=1"], "no ZEO server answers"),
        ([], "Missing argument"),
        (["{path}", "nothing"], "no array at 'nothing'"),
    ],
)
def test_command_errors(path, args, message):
    result = run(*(a.format(path=path) for a in args))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_storage_that_had_blobs(path):
    """Their directory is gone, or was never given."""
    (file,) = blobs(path)
    db = ZODB.DB(FileStorage(path, read_only=True))
    found = the(dz.check(db))
    assert (found.path, found.kind) == ("A", "segment")
    db.close()
    os.rename(path + ".blobs", path + ".away")
    assert the(dz.check(path)).path == "A"
    assert file
    transaction.abort()
    assert p64(1)
