"""The persistent extent map: states round trip, changes follow a bytearray, conflicts merge by byte."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import transaction
import ZODB
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import ConflictError

from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.errors import FormatError, NotStoredError
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import FANOUT, LEAF_BYTES, LEAF_VERSION, VERSION
from dask_zbig.storage.leafstate import MOVED, LeafState
from dask_zbig.storage.segment import InlineSegment, SegmentRef, checksum
from dask_zbig.storage.tree import (
    FIRST_AHEAD,
    LEAVES_AHEAD,
    ExtentLeaf,
    ExtentNode,
    Journal,
    Truncation,
    ZBigFile,
    _Callbacks,
    checked,
    node_bytes,
    watch,
)

from tests.names import named  # isort: skip

N = 60  # bytes that the model looks at


class Reference:
    """What ZODB puts in the place of a referenced object while it resolves a conflict."""

    def __init__(self, oid):
        self.oid = oid

    def __eq__(self, other):
        raise AssertionError("references must be compared by their oids")

    __hash__ = None


class Segment:
    """Something with an oid and bytes."""

    def __init__(self, number, length=2 * N):
        self.oid = number.to_bytes(8, "big")
        self.data = np.random.default_rng(number).integers(1, 256, length, "u1").tobytes()

    def ref(self):
        return SegmentRef(Reference(self.oid), len(self.data), checksum(self.data))


def content(leaf, segments, base=0, size=N):
    """The bytes that a leaf describes."""
    by_oid = {s.oid: s.data for s in segments}
    out = bytearray(size)
    for start, stop, index, offset in leaf.extents.tolist():
        a, b = max(start, base), min(stop, base + size)
        if a < b:
            at = offset + a - start
            out[a - base : b - base] = by_oid[leaf.refs[index].obj.oid][at : at + b - a]
    return bytes(out)


def from_state(state):
    """As merges see it, with references in place of segments."""
    leaf, loaded = ExtentLeaf(), LeafState.unpack(ExtentLeaf(), state)
    leaf.extents, leaf.refs, leaf.move = loaded.extents, loaded.refs, loaded.move
    return leaf


spans = st.tuples(st.integers(0, N), st.integers(0, N)).map(sorted).filter(lambda s: s[0] < s[1])
#: ("splice", (lo, hi), segment, offset) or ("cut", (lo, hi))
changes = st.lists(
    st.tuples(st.just("splice"), spans, st.integers(0, 3), st.integers(0, N)) | st.tuples(st.just("cut"), spans),
    max_size=8,
)
SEGMENTS = [Segment(i) for i in range(1, 9)]


def apply(leaf, model, todo, segments=SEGMENTS):
    for kind, (lo, hi), *more in todo:
        if kind == "cut":
            leaf.cut(lo, hi)
            model[lo:hi] = bytes(hi - lo)
        else:
            segment, offset = segments[more[0]], more[1]
            leaf.splice(ex.make([(lo, hi, 0, offset)]), [segment.ref()])
            model[lo:hi] = segment.data[offset : offset + hi - lo]


# -- leaves


@given(changes)
def test_leaf_is_a_bytearray(todo):
    leaf, model = ExtentLeaf(), bytearray(N)
    apply(leaf, model, todo)
    assert content(leaf, SEGMENTS) == model
    twin = from_state(leaf.__getstate__())
    assert content(twin, SEGMENTS) == model
    assert twin.__getstate__()[1:3] == leaf.__getstate__()[1:3]
    assert len({r.key for r in leaf.refs}) == len(leaf.refs) == len(ex.used(leaf.extents))
    assert ex.coalesce(leaf.extents).tolist() == leaf.extents.tolist()


def joined():
    """A leaf whose two segments have been joined into a third; and its state before."""
    leaf = ExtentLeaf()
    apply(leaf, bytearray(N), [("splice", (0, 10), 0, 0), ("splice", (10, 20), 1, 0)])
    before = leaf.__getstate__()
    one, two, both = SEGMENTS[0].oid, SEGMENTS[1].oid, SEGMENTS[2]
    leaf.join(ex.make([(0, 20, 0, 0)]), [both.ref()], [(0, 10, one, 0), (10, 20, two, 0)])
    assert leaf.move.to == both.oid
    return leaf, before


# guard: tree.py, `_take`: the move is forgotten; removed -> it is written with every record, for 8 commits
@pytest.mark.parametrize(
    ("spans", "noted"), [([(0, 19)], True), ([(0, 20)], False), ([(0, 5), (5, 30)], False), ([(1, 5), (8, 20)], True)]
)
def test_a_move_is_noted_while_something_is_left_of_it(spans, noted):
    leaf, _ = joined()
    leaf.splice(ex.make([(lo, hi, i, 0) for i, (lo, hi) in enumerate(spans)]), [s.ref() for s in SEGMENTS[3:5]])
    assert (leaf.move.to == SEGMENTS[2].oid) is noted
    leaf.cut(0, 20)
    assert leaf.move.to == b""


def test_a_move_of_what_the_other_side_has_overwritten_is_not_noted():
    leaf, before = joined()
    new = from_state(before)
    apply(new, bytearray(N), [("splice", (0, 20), 3, 0)])
    merged = from_state(ExtentLeaf()._p_resolveConflict(before, leaf.__getstate__(), new.__getstate__()))
    assert merged.extents.tolist() == new.extents.tolist()
    assert merged.move.to == b""


@given(changes, changes, changes)
def test_leaf_conflicts(before, theirs, ours):
    """Merged byte by byte, or refused if both changed the same byte, and not to the same."""
    old, model = ExtentLeaf(), bytearray(N)
    apply(old, model, before)
    sides = []
    for todo, segments in ((theirs, SEGMENTS[:4]), (ours, SEGMENTS[4:])):
        leaf, mine = from_state(old.__getstate__()), bytearray(model)
        apply(leaf, mine, todo, segments)
        changed = ex.diff(old.extents, [r.obj.oid for r in old.refs], leaf.extents, [r.obj.oid for r in leaf.refs])
        sides.append((leaf, mine, changed))
    (committed, a, changed_a), (new, b, changed_b) = sides
    expected = bytearray(model)
    for lo, hi in changed_a.tolist():
        expected[lo:hi] = a[lo:hi]
    clash = False
    for lo, hi in ex.intersect(changed_a, changed_b).tolist():
        clash |= a[lo:hi] != b[lo:hi]  # both a hole
    for lo, hi in changed_b.tolist():
        expected[lo:hi] = b[lo:hi]
    states = [leaf.__getstate__() for leaf in (old, committed, new)]
    if clash:
        with pytest.raises(ConflictError, match="changed by another transaction"):
            ExtentLeaf()._p_resolveConflict(*states)
    else:
        merged = from_state(ExtentLeaf()._p_resolveConflict(*states))
        assert content(merged, SEGMENTS) == expected
        assert len({r.key for r in merged.refs}) == len(merged.refs)


def test_leaf_merges_neighbouring_bytes_and_refuses_the_same():
    def changed(lo, hi, segment):
        leaf = ExtentLeaf()
        leaf.splice(ex.make([(lo, hi, 0, 0)]), [segment.ref()])
        return leaf.__getstate__()

    one, two = SEGMENTS[:2]
    old = ExtentLeaf().__getstate__()
    merged = from_state(ExtentLeaf()._p_resolveConflict(old, changed(0, 5, one), changed(5, 6, two)))
    assert merged.extents.tolist() == [(0, 5, 0, 0), (5, 6, 1, 0)]
    with pytest.raises(ConflictError, match=r"bytes 4\.\.5 of an array"):
        ExtentLeaf()._p_resolveConflict(old, changed(0, 5, one), changed(4, 6, two))


def test_leaf_keeps_extents_immutable():
    """Whoever took them before a change (a loader) has what they were."""
    leaf = ExtentLeaf()
    leaf.splice(ex.make([(0, 10, 0, 0)]), [SEGMENTS[0].ref()])
    before = leaf.extents
    leaf.splice(ex.make([(2, 5, 0, 0)]), [SEGMENTS[1].ref()])
    assert before.tolist() == [(0, 10, 0, 0)]
    assert not from_state(leaf.__getstate__()).extents.flags.writeable


# -- nodes


def node_of(keys, level=1):
    node = ExtentNode(level)
    for key in keys:
        node.put(key, Reference(key.to_bytes(8, "big")))
    return node


@given(st.sets(st.integers(0, FANOUT - 1), max_size=20))
def test_node_round_trip(keys):
    node = ExtentNode(3)
    for key in keys:
        node.put(key, ExtentNode(2))
    twin = ExtentNode(1)
    twin.__setstate__(node.__getstate__())
    assert twin.level == 3
    assert twin.children == node.children


def test_node_cut():
    node = node_of([0, 5, 9])
    node.cut(5)
    assert sorted(node.children) == [0]


def children_in(state):
    _, _, packed, children = state
    return dict(zip(np.frombuffer(packed, "<u2").tolist(), children, strict=True))


def put(state, key, oid):
    node = ExtentNode(state[1])
    node.children = children_in(state)
    if oid is None:
        del node.children[key]
    else:
        node.put(key, Reference(oid))
    return node.__getstate__()


def test_node_conflicts():
    old = node_of([0, 1]).__getstate__()
    merged = children_in(ExtentNode(1)._p_resolveConflict(old, put(old, 7, b"theirs__"), put(old, 3, b"ours____")))
    assert {k: c.oid for k, c in merged.items()} == {
        0: bytes(8),
        1: b"\0" * 7 + b"\1",
        3: b"ours____",
        7: b"theirs__",
    }
    merged = children_in(ExtentNode(1)._p_resolveConflict(old, put(old, 1, None), put(old, 3, b"ours____")))
    assert sorted(merged) == [0, 3]
    for theirs, ours in [(b"theirs__", b"ours____"), (None, b"ours____"), (b"theirs__", None)]:
        with pytest.raises(ConflictError):
            ExtentNode(1)._p_resolveConflict(old, put(old, 1, theirs), put(old, 1, ours))


# -- journal, truncation


def test_journal_conflicts():
    def state(*jobs):
        return (VERSION, jobs)

    resolve = Journal()._p_resolveConflict
    assert resolve(state("a"), state("a", "b"), state("a", "c")) == state("a", "b", "c")
    with pytest.raises(ConflictError, match="published by another"):
        resolve(state("a"), state("a", "b"), state("a", "b"))


def test_journal_is_bounded():
    journal = Journal()
    for k in range(300):
        journal.add(str(k))
    assert len(journal.jobs) == Journal.KEPT
    assert journal.jobs[-1] == "299"


def test_truncation_cannot_be_merged():
    assert not hasattr(Truncation(), "_p_resolveConflict")


# -- files


def fill(file, positions):
    for k in positions:
        leaf = file.leaf(k // LEAF_BYTES)
        leaf.splice(ex.make([(k, k + 1, 0, 0)]), [SEGMENTS[0].ref()])


def positions_of(file):
    out = []
    for index, leaf in file.leaves(0, 1 << 63):
        for start, stop in ex.covered(leaf.extents).tolist():
            assert index * LEAF_BYTES <= start < stop <= (index + 1) * LEAF_BYTES
            out += range(start, stop)
    return out


T = 1 << 40
places = st.integers(0, 10) | st.sampled_from(
    [
        LEAF_BYTES - 1,
        LEAF_BYTES,
        LEAF_BYTES + 1,
        node_bytes(2) - 1,
        node_bytes(2),
        3 * T,
        node_bytes(3),
        2 * node_bytes(3),
    ]
)


@given(st.lists(places, max_size=8), places, st.lists(places, max_size=3))
def test_file_truncate(before, size, after):
    file = ZBigFile()
    fill(file, before)
    assert positions_of(file) == sorted(set(before))
    file.truncate(size)
    assert positions_of(file) == sorted({k for k in before if k < size})
    fill(file, after)
    assert positions_of(file) == sorted({k for k in before if k < size} | set(after))


def test_file_grows_from_the_top():
    file = ZBigFile()
    assert list(file.leaves(0, 100)) == []
    first = file.leaf(0)
    assert file.depth == 0
    file.leaf(FANOUT)
    assert file.depth == 2
    assert file.leaf(0) is first
    assert [i for i, _ in file.leaves(0, 1 << 50)] == [0, FANOUT]
    assert [i for i, _ in file.leaves(LEAF_BYTES, 1 << 50)] == [FANOUT]
    assert [(node.level, lo) for node, lo, _ in file.nodes(0, 1 << 50)] == [(2, 0), (1, 0), (1, node_bytes(2))]
    covered = [hi - lo for _, lo, hi in file.nodes(0, 1)]
    assert covered == [node_bytes(3), node_bytes(2)]


def test_reserve_makes_the_tree_deep_enough():
    file = ZBigFile()
    file.reserve(0)
    assert file.root is None
    file.reserve(LEAF_BYTES)
    assert (file.depth, type(file.root)) == (0, ExtentLeaf)
    file.reserve(LEAF_BYTES + 1, LEAF_BYTES)
    assert file.depth == 1
    assert [i for i, _ in file.leaves(0, 1 << 50)] == [0, 1]
    file.reserve((1 << 63) - 1, LEAF_BYTES + 1)
    assert FANOUT**file.depth * LEAF_BYTES >= 1 << 63


@pytest.mark.parametrize(
    ("leaves", "made"), [(LEAVES_AHEAD, LEAVES_AHEAD), (LEAVES_AHEAD + 1, FIRST_AHEAD), (1 << 24, FIRST_AHEAD)]
)
def test_reserve_makes_all_leaves_of_what_is_new_or_the_first_of_very_many(leaves, made):
    file = ZBigFile()
    file.reserve(2 * LEAF_BYTES)
    file.reserve((2 + leaves) * LEAF_BYTES, 2 * LEAF_BYTES)
    assert [i for i, _ in file.leaves(0, 1 << 60)] == list(range(2 + made))


def test_a_new_file_cannot_be_pickled():
    import pickle

    import dask_zbig as dz

    array = dz.ZBigArray(3)
    array[0] = 1
    with pytest.raises(NotStoredError):
        pickle.dumps(array._file)


# -- what is damaged, or of another version, is refused by name

GOOD = {
    ZBigFile: (VERSION, 0, None, Truncation(), Journal()),
    Truncation: (VERSION, 0),
    Journal: (VERSION, ()),
    ExtentNode: (VERSION, 1, b"", ()),
    ExtentLeaf: (VERSION, b"", b"", (), b"", b""),
    InlineSegment: (VERSION, b"abc"),
    ZBigArray: (VERSION, (3,), "<f8", "C", ZBigFile()),
}


@pytest.mark.parametrize(("cls", "state"), [*GOOD.items(), (ExtentLeaf, (LEAF_VERSION, b"", ()))])
def test_states(cls, state):
    obj = cls.__new__(cls)
    obj.__setstate__(state)
    newer = 1 + (LEAF_VERSION if cls is ExtentLeaf else VERSION)
    with pytest.raises(FormatError, match=rf"{cls.__name__} .*newer .*version {newer};"):
        cls.__new__(cls).__setstate__((newer, *state[1:]))
    with pytest.raises(FormatError, match=rf"{cls.__name__} .*version -1"):
        cls.__new__(cls).__setstate__((-1, *state[1:]))
    for bad in [(*state, 1), state[:-1], (), None, {}, ("1",), (True, *state[1:]), b"x"]:
        with pytest.raises(FormatError, match=cls.__name__):
            cls.__new__(cls).__setstate__(bad)


def rows(*values):
    return np.array(list(values), ex.EXTENT).tobytes()


def table(*lengths):
    return np.array([(n, 0) for n in lengths], "<u8,<u8").tobytes()


ONE = (InlineSegment(b"0123456789"),)


@pytest.mark.parametrize(
    "state",
    [
        (rows((0, 10, 0, 0))[:-1], table(10), ONE),
        (rows((0, 10, 0, 0)), table(10)[:-1], ONE),
        (rows((0, 10, 0, 0)), table(10), ()),
        (rows((0, 10, 0, 0)), table(9), ONE),
        (rows((0, 10, 0, 1)), table(10), ONE),
        (rows((0, 10, 1, 0)), table(10), ONE),
        (rows((0, 10, 0, 2**64 - 5)), table(10), ONE),
        (rows((0, 10, 0, 0), (9, 12, 0, 0)), table(20), ONE),
        (rows((20, 30, 0, 0), (0, 10, 0, 0)), table(20), ONE),
        (rows((5, 5, 0, 0)), table(20), ONE),
        (rows((9, 5, 0, 0)), table(20), ONE),
        (rows((0, LEAF_BYTES + 1, 0, 0)), table(2 * LEAF_BYTES), ONE),
        (rows((LEAF_BYTES - 1, LEAF_BYTES + 1, 0, 0)), table(2 * LEAF_BYTES), ONE),
    ],
)
def test_damaged_leaf(state):
    with pytest.raises(FormatError):
        ExtentLeaf().__setstate__((VERSION, *state, b"", b""))
    ExtentLeaf().__setstate__((VERSION, rows((0, 10, 0, 0)), table(10), ONE, b"", b""))  # this one is sound


@pytest.mark.parametrize(
    ("to", "moved"),
    [
        (b"short", b""),
        (b"12345678", b"x"),
        (b"12345678", np.array([(5, 5, b"a", 0)], MOVED).tobytes()),
        (b"12345678", np.array([(5, 9, b"a", 0), (8, 10, b"a", 0)], MOVED).tobytes()),
        ("12345678", b""),
    ],
    ids=repr,
)
def test_damaged_move(to, moved):
    with pytest.raises(FormatError, match=r"move|types"):
        ExtentLeaf().__setstate__((VERSION, rows((0, 10, 0, 0)), table(10), ONE, to, moved))


@pytest.mark.parametrize(("keys", "count"), [([1, 1], 2), ([2, 1], 2), ([1024], 1), ([0, 1], 1), ([0], 2)], ids=repr)
def test_damaged_node(keys, count):
    with pytest.raises(FormatError, match="ExtentNode"):
        ExtentNode(1).__setstate__((VERSION, 1, np.array(keys, "<u2").tobytes(), (Reference(b"x"),) * count))


@pytest.mark.parametrize(
    ("level", "child"),
    [(1, ExtentNode(1)), (2, ExtentLeaf()), (1, None), (0, ExtentLeaf()), (5, ExtentNode(4)), (True, ExtentLeaf())],
    ids=named,
)
def test_damaged_children(level, child):
    with pytest.raises(FormatError, match=r"ExtentNode .*level"):
        ExtentNode(1).__setstate__((VERSION, level, b"\0\0", (child,)))


@pytest.mark.parametrize(
    "fields",
    [
        (0, ExtentNode(1), Truncation(), Journal()),
        (1, ExtentLeaf(), Truncation(), Journal()),
        (1, None, Truncation(), Journal()),
        (5, ExtentNode(5), Truncation(), Journal()),
        (-1, None, Truncation(), Journal()),
        ("0", None, Truncation(), Journal()),
        (0, None, Journal(), Journal()),
        (0, None, Truncation(), None),
    ],
    ids=named,
)
def test_damaged_file(fields):
    with pytest.raises(FormatError, match="ZBigFile"):
        ZBigFile().__setstate__((VERSION, *fields))


@pytest.mark.parametrize("segment", [None, ExtentLeaf(), Reference(b"x" * 8)], ids=lambda x: type(x).__name__)
def test_a_leaf_of_no_segments(segment):
    with pytest.raises(FormatError, match=f"refers to a {type(segment).__name__}"):
        ExtentLeaf().__setstate__((VERSION, rows((0, 10, 0, 0)), table(10), (segment,), b"", b""))


def test_a_leaf_in_another_ones_place():
    file = ZBigFile()
    leaf = file.leaf(1)
    leaf.splice(ex.make([(LEAF_BYTES, LEAF_BYTES + 5, 0, 0)]), [SegmentRef(InlineSegment(b"hello"), 5, 0)])
    assert checked(leaf, 1) is leaf
    file.root.put(0, leaf)
    with pytest.raises(FormatError, match="is leaf 0 of its file"):
        checked(file.leaf(0), 0)
    file.root.cut(1)
    with pytest.raises(FormatError, match="is leaf 0 of its file"):
        file.ends_by(5)
    with pytest.raises(FormatError, match="is leaf 0 of its file"):
        file.truncate(5)


def test_a_node_that_is_its_own_child():
    file = ZBigFile()
    file.leaf(FANOUT + 3)
    file.root.put(1, file.root)
    for use in (
        lambda: list(file.leaves(0, 1 << 62)),
        lambda: list(file.nodes(0, 1 << 62)),
        lambda: file.leaf(FANOUT + 3),
        lambda: file.ends_by((FANOUT + 3) * LEAF_BYTES),
    ):
        with pytest.raises(FormatError, match="ExtentNode is of level 2, in the place of one of level 1"):
            use()
    file.depth = 3
    with pytest.raises(FormatError, match="is of level 2, in the place of one of level 3"):
        list(file.leaves(0, 5))


@pytest.mark.parametrize("count", [None, "1"])
def test_damaged_counts(count):
    with pytest.raises(FormatError, match="Truncation"):
        Truncation().__setstate__((VERSION, count))
    with pytest.raises(FormatError, match="Journal"):
        Journal().__setstate__((VERSION, [count]))
    with pytest.raises(FormatError, match="InlineSegment"):
        InlineSegment(b"").__setstate__((VERSION, count))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (-1,)},
        {"shape": (2**62,)},
        {"shape": (2**40, 2**40)},
        {"shape": 7.5},
        {"shape": None},
        {"shape": ("3",)},
        {"shape": (1,) * 65},
        {"descr": "|O"},
        {"descr": [("a", "|O")]},
        {"descr": "|V0"},
        {"descr": "nonsense"},
        {"descr": None},
        {"descr": (("<f8", (-1,)))},
        {"descr": [("a",)]},
        {"descr": ("<f8", (3,))},
        {"descr": "T"},
        {"order": "A"},
        {"order": []},
        {"file": None},
        {"file": ExtentLeaf()},
    ],
    ids=named,
)
def test_damaged_array(change):
    fields = {"shape": (3,), "descr": "<f8", "order": "C", "file": ZBigFile(), **change}
    with pytest.raises(FormatError, match="ZBigArray"):
        ZBigArray.__new__(ZBigArray).__setstate__((VERSION, *fields.values()))
    with pytest.raises(FormatError, match="ZBigArray"):
        ZBigArray.__new__(ZBigArray).__setstate__((VERSION, (3,), "<f8", "C", ZBigFile(), {"_shape": (10**9,)}))


@pytest.mark.parametrize("packed", [b"\0", 5, None], ids=repr)
def test_damaged_types(packed):
    with pytest.raises(FormatError):
        ExtentNode(1).__setstate__((VERSION, 1, packed, (Reference(b"x"),)))
    with pytest.raises(FormatError):
        ExtentLeaf().__setstate__((VERSION, packed, table(10), ONE, b"", b""))


# -- in a database


def test_round_trip_in_a_database():
    db = ZODB.DB(None)
    manager = transaction.TransactionManager()
    conn = db.open(manager)
    file = conn.root()["file"] = ZBigFile()
    segment = InlineSegment(b"hello")
    file.leaf(FANOUT + 3).splice(
        ex.make([((FANOUT + 3) * LEAF_BYTES, (FANOUT + 3) * LEAF_BYTES + 5, 0, 0)]),
        [SegmentRef(segment, 5, checksum(b"hello"))],
    )
    manager.commit()
    conn.cacheMinimize()
    ((index, leaf),) = [(i, x) for i, x in file.leaves(0, 1 << 60) if len(x.extents)]
    assert (file.depth, index) == (2, FANOUT + 3)
    assert leaf.refs[0].obj.data == b"hello"
    assert leaf.refs[0].checksum == checksum(b"hello")
    conn.close()
    db.close()


# -- what is called


def test_a_callback_is_called_for_its_object_and_while_that_lives():
    called = []
    leaf = ExtentLeaf()
    watch(leaf, lambda: called.append(1))
    leaf._p_invalidate()
    watch(leaf, lambda: called.append(2))
    leaf._p_invalidate()
    assert called == [1, 2]


# guard: tree.py, `_Callbacks.get`: `ref() is obj`; else the new leaf was taken for the old one
def test_a_callback_is_not_called_for_another_object_at_the_same_address():
    called = []
    leaf = ExtentLeaf()
    watch(leaf, lambda: called.append(1))
    address = id(leaf)
    del leaf
    leaves = [ExtentLeaf() for _ in range(1000)]
    (again,) = [one for one in leaves if id(one) == address]
    again._p_invalidate()
    assert called == []


# guard: tree.py, `_Callbacks.set`: sweeps; else there were 10,000
def test_callbacks_of_objects_that_died_are_forgotten():
    callbacks = _Callbacks()
    kept = [ExtentLeaf() for _ in range(200)]
    for leaf in kept:
        callbacks.set(leaf, kept.clear)
    elsewhere = []
    for _ in range(10):
        leaves = [ExtentLeaf() for _ in range(1000)]
        for leaf in leaves:
            callbacks.set(leaf, print)
        leaves.clear()
        leaf = None
        gc.collect()
        elsewhere += [ExtentLeaf() for _ in range(1000)]  # the next ones will be at other addresses
    assert len(callbacks._by_id) < 4000
    assert all(callbacks.get(one) == kept.clear for one in kept)
