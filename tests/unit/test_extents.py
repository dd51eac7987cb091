"""The extent algebra against a model that has one Python value for each byte."""

from __future__ import annotations

import doctest
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_zbig.errors import FormatError
from dask_zbig.storage import extents as ex

SIZE = 40  # bytes of the modelled part of the array
SEGMENTS = 4
END = 2**64 - 1
HOLE = None

# the modelled part lies at the beginning, across 2^63, where floats lose bits, or at the very end
bases = st.sampled_from([0, 2**63 - SIZE // 2, 2**53, END - SIZE])
edges = st.integers(-3, SIZE + 3)


@st.composite
def arrays(draw, base=0):
    """Extents within [base, base + SIZE), read-only: a function that writes to its arguments fails."""
    points = sorted(draw(st.sets(st.integers(0, SIZE), max_size=14)))
    rows = []
    for start, stop in pairwise(points):
        if not draw(st.integers(0, 2)):
            continue
        segment, offset = draw(st.integers(0, SEGMENTS - 1)), draw(st.integers(0, 30))
        if rows and draw(st.booleans()):  # where the previous one ends in its segment
            segment, offset = rows[-1][2], rows[-1][3] + rows[-1][1] - rows[-1][0]
        rows.append((base + start, base + stop, segment, offset))
    return frozen(ex.make(rows))


@st.composite
def ranges(draw):
    """Ranges within [0, SIZE), of which some touch."""
    points = sorted(draw(st.sets(st.integers(0, SIZE), max_size=14)))
    pairs = [p for p in pairwise(points) if draw(st.booleans())]
    return frozen(np.array(pairs, np.uint64).reshape(-1, 2))


@pytest.fixture(autouse=True, scope="module", params=[0, ex.FEW])
def few(request):
    """There are two ways to do most things, of which one is for few rows. All of the tests are for both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ex, "FEW", request.param)
        yield


keys = st.lists(st.sampled_from("uvwxyz"), min_size=SEGMENTS, max_size=SEGMENTS)


def frozen(array):
    array.flags.writeable = False
    return array


def model(extents, base=0, keys=range(SEGMENTS)):
    """What serves each byte: (segment's key, offset) or HOLE."""
    served = [HOLE] * SIZE
    for start, stop, segment, offset in extents.tolist():
        for position in range(start, stop):
            assert served[position - base] is HOLE
            served[position - base] = (keys[segment], offset + position - start)
    return served


def members(ranges):
    return {p for start, stop in ranges.tolist() for p in range(start, stop)}


def check(extents):
    assert extents.dtype == ex.EXTENT
    ex.validate(extents, [1000] * SEGMENTS * 2, 0, END)


def check_ranges(ranges, expected, base=0):
    """The ranges are these positions, sorted and merged."""
    assert ranges.dtype == np.uint64
    assert ranges.ndim == 2
    flat = ranges.ravel().tolist()
    assert all(a < b for a, b in pairwise(flat))
    assert {p - base for p in members(ranges)} == expected


# -- making and checking


def test_format():
    assert ex.EXTENT.itemsize == 28
    extents = ex.make([(1, 2, 3, 4)])
    packed = b"".join(n.to_bytes(size, "little") for n, size in [(1, 8), (2, 8), (3, 4), (4, 8)])
    assert extents.tobytes() == packed
    assert ex.empty().dtype == ex.EXTENT
    assert len(ex.empty()) == len(ex.make([])) == 0


def test_make_takes_an_iterator_of_any_rows():
    rows = [(0, 4, 0, 0), (4, 6, 1, 2)]
    assert ex.make(iter(rows)).tolist() == ex.make([list(row) for row in rows]).tolist() == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 4, 0, 0), (5, 5, 0, 0)], r"extent 1 \(start 5, stop 5, segment 0, offset 0\) is empty"),
        ([(5, 4, 0, 0)], "extent 0 .* is empty"),
        ([(8, 9, 0, 0), (0, 4, 0, 0)], "extent 1 .* is not sorted"),
        ([(0, 4, 0, 0), (3, 6, 1, 0)], "extent 1 .* overlaps"),
        ([(0, 4, 0, 0), (0, 4, 0, 0)], "extent 1 .* overlaps"),
    ],
)
def test_make_and_validate_refuse_disorder(rows, message):
    with pytest.raises(FormatError, match=message):
        ex.make(rows)
    with pytest.raises(FormatError, match=message):
        ex.validate(np.array(rows, ex.EXTENT), [100, 100], 0, 100)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((9, 20, 0, 0), "is outside of"),
        ((40, 101, 0, 0), "is outside of"),
        ((40, END, 0, 0), "is outside of"),
        ((10, 20, 2, 0), "none of the 2 segments"),
        ((10, 20, 2**32 - 1, 0), "none of the 2 segments"),
        ((10, 20, 0, 51), "ends beyond its segment"),
        ((10, 20, 0, 61), "ends beyond its segment"),
        ((10, 20, 0, END - 5), "ends beyond its segment"),
        ((10, 20, 0, END), "ends beyond its segment"),
        ((10, 20, 1, 0), "ends beyond its segment"),
    ],
)
def test_validate_names_the_extent(row, message):
    good = (30, 40, 0, 0)
    rows = [good, row] if row[0] > 30 else [row, good]
    with pytest.raises(FormatError, match=rf"extent {rows.index(row)} .*{message}"):
        ex.validate(np.array(rows, ex.EXTENT), [60, 0], 10, 100)


def test_validate_accepts_the_largest_numbers():
    ex.validate(ex.make([(0, END, 0, 0)]), [END], 0, 2**64)
    ex.validate(ex.make([(END - 1, END, 0, END - 1)]), [END], END - 1, 2**70)
    ex.validate(ex.empty(), [], 0, 0)


numbers = st.one_of(
    st.integers(0, 12),
    st.sampled_from([2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, END - 3, END - 1, END]),
    st.integers(0, END),
)


@given(
    st.lists(st.tuples(numbers, numbers, st.integers(0, 3) | st.just(2**32 - 1), numbers), max_size=4),
    st.lists(numbers, max_size=3),
    numbers,
    numbers | st.just(2**64 + 5),
)
def test_validate_hostile(rows, lengths, lo, hi):
    good = all(
        lo <= start < stop <= hi and segment < len(lengths) and offset + stop - start <= lengths[segment]
        for start, stop, segment, offset in rows
    ) and all(a[1] <= b[0] for a, b in pairwise(rows))
    extents = np.array(rows, ex.EXTENT)
    if good:
        ex.validate(extents, lengths, lo, hi)
    else:
        with pytest.raises(FormatError, match=r"extent [0-3] "):
            ex.validate(extents, lengths, lo, hi)


# -- extents


@given(st.data(), bases)
def test_lookup(data, base):
    extents = data.draw(arrays(base))
    served = model(extents, base)
    for position in range(SIZE):
        index = ex.lookup(extents, base + position)
        assert type(index) is int
        if index < 0:
            assert index == -1
            assert served[position] is HOLE
        else:
            start, _, segment, offset = extents[index].tolist()
            assert served[position] == (segment, offset + base + position - start)
    assert ex.lookup(extents, -1) == ex.lookup(extents, 2**70) == -1


@given(st.data(), bases, edges, edges)
def test_clip_and_cut(data, base, lo, hi):
    extents = data.draw(arrays(base))
    served = model(extents, base)
    inside, outside = ex.clip(extents, base + lo, base + hi), ex.cut(extents, base + lo, base + hi)
    check(inside)
    check(outside)
    assert model(inside, base) == [s if lo <= p < hi else HOLE for p, s in enumerate(served)]
    assert model(outside, base) == [HOLE if lo <= p < hi else s for p, s in enumerate(served)]


@given(st.data(), bases)
def test_splice(data, base):
    old, new = data.draw(arrays(base)), data.draw(arrays(base))
    result = ex.splice(old, new)
    check(result)
    before, over = model(old, base), model(new, base)
    assert model(result, base) == [o if n is HOLE else n for o, n in zip(before, over, strict=True)]


@given(st.lists(st.tuples(edges, edges, st.integers(0, SEGMENTS), st.integers(0, 100)), max_size=12))
def test_writing_like_a_bytearray(writes):
    """Any sequence of writes and cuts reads back as the same on a bytearray."""
    segments = np.random.default_rng(0).integers(1, 256, (SEGMENTS, 200), np.uint8)
    expected = bytearray(SIZE)
    extents = ex.empty()
    for lo, hi, segment, offset in writes:
        lo = max(lo, 0)
        hi = max(lo, min(hi, SIZE))
        if segment == SEGMENTS:
            extents = ex.cut(extents, lo, hi)
            expected[lo:hi] = bytes(hi - lo)
        elif lo < hi:
            extents = ex.coalesce(ex.splice(extents, ex.make([(lo, hi, segment, offset)])))
            expected[lo:hi] = segments[segment, offset : offset + hi - lo].tobytes()
    content = bytearray(SIZE)
    for start, stop, segment, offset in extents.tolist():
        content[start:stop] = segments[segment, offset : offset + stop - start].tobytes()
    assert content == expected


@given(st.data(), bases)
def test_coalesce(data, base):
    extents = data.draw(arrays(base))
    result = ex.coalesce(extents)
    check(result)
    served = model(extents, base)
    assert model(result, base) == served
    heads = 0
    for before, this in pairwise([HOLE, *served]):
        heads += this is not HOLE and (before is HOLE or this != (before[0], before[1] + 1))
    assert len(result) == heads  # no fewer are possible


@given(arrays(), st.lists(st.integers(0, 2**32 - 1), min_size=SEGMENTS, max_size=SEGMENTS))
def test_renumber_and_used(extents, mapping):
    renumbered = ex.renumber(extents, np.array(mapping))
    assert renumbered.dtype == ex.EXTENT
    assert model(renumbered, 0, {m: m for m in mapping}) == model(extents, 0, mapping)
    assert ex.used(renumbered).tolist() == sorted({mapping[s] for s in extents["segment"].tolist()})
    assert ex.used(renumbered).dtype == np.intp


@given(arrays())
def test_renumber_takes_any_integers(extents):
    mapping = np.arange(SEGMENTS)[::-1]
    expected = ex.renumber(extents, mapping).tolist()
    for dtype in ("<u4", np.uint64, np.int16):
        assert ex.renumber(extents, mapping.astype(dtype)).tolist() == expected


@given(arrays(), arrays(), edges, edges)
def test_results_share_no_memory(extents, other, lo, hi):
    for result in (
        ex.clip(extents, lo, hi),
        ex.cut(extents, lo, hi),
        ex.splice(extents, other),
        ex.splice(other, extents),
        ex.coalesce(extents),
        ex.renumber(extents, np.arange(SEGMENTS)),
    ):
        assert result.flags.writeable
        assert not np.shares_memory(result, extents)


# -- ranges


@given(st.data(), bases, edges, edges)
def test_covered_and_holes(data, base, lo, hi):
    extents = data.draw(arrays(base))
    served = model(extents, base)
    check_ranges(ex.covered(extents), {p for p in range(SIZE) if served[p] is not HOLE}, base)
    first, last = max(base + lo, 0) - base, min(base + hi, END) - base
    free = {p for p in range(first, last) if not 0 <= p < SIZE or served[p] is HOLE}
    check_ranges(ex.holes(extents, base + lo, base + hi), free, base)


@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=10))
def test_normalize(pairs):
    expected = {p for start, stop in pairs for p in range(start, stop)}
    check_ranges(ex.normalize(pairs), expected)
    check_ranges(ex.normalize(frozen(np.array(pairs, np.uint64).reshape(-1, 2))), expected)


@given(ranges(), ranges())
def test_set_operations(a, b):
    check_ranges(ex.union(a, b), members(a) | members(b))
    check_ranges(ex.intersect(a, b), members(a) & members(b))
    check_ranges(ex.subtract(a, b), members(a) - members(b))
    assert ex.total(a) == len(members(a))
    assert type(ex.total(a)) is int


@given(edges, edges)
def test_no_ranges_and_one_range(lo, hi):
    lo, hi = max(lo, 0), max(hi, 0)
    check_ranges(ex.one_range(lo, hi), set(range(lo, hi)))
    check_ranges(ex.no_ranges(), set())
    assert ex.one_range(END - 1, END).tolist() == [[END - 1, END]]


def test_ranges_up_to_the_end():
    everything = np.array([[0, END]], np.uint64)
    assert ex.total(everything) == END
    assert ex.subtract(everything, np.array([[5, END]], np.uint64)).tolist() == [[0, 5]]
    assert ex.holes(ex.empty(), -5, 2**70).tolist() == [[0, END]]


# -- comparing and merging


@given(st.data(), bases, keys, keys)
def test_diff(data, base, keys_a, keys_b):
    a, b = data.draw(arrays(base)), data.draw(arrays(base))
    pairs = zip(model(a, base, keys_a), model(b, base, keys_b), strict=True)
    check_ranges(ex.diff(a, keys_a, b, keys_b), {p for p, (x, y) in enumerate(pairs) if x != y}, base)


@given(arrays(), st.permutations(range(SEGMENTS)))
def test_no_diff_between_tables_in_another_order(extents, order):
    names = [("oid", i) for i in range(SEGMENTS)]
    mapping = np.argsort(order)
    assert len(ex.diff(extents, names, ex.renumber(extents, mapping), [names[i] for i in order])) == 0
    assert len(ex.diff(ex.empty(), [], ex.empty(), [])) == 0


def build(served, base, keys, breaks):
    """Extents for a model in terms of keys; runs are also split at `breaks`, and equal keys used in turn."""
    rows = []
    for position, source in enumerate(served):
        if source is HOLE:
            continue
        key, offset = source
        at = base + position
        if rows and position not in breaks and rows[-1][1] == at:
            start, _, segment, first = rows[-1]
            if keys[segment] == key and first + at - start == offset:
                rows[-1] = (start, at + 1, segment, first)
                continue
        choices = [i for i, k in enumerate(keys) if k == key]
        rows.append((at, at + 1, choices[position % len(choices)], offset))
    return frozen(ex.make(rows))


@st.composite
def sides(draw, base, served):
    """Some change of the model: the new model, its extents, and their keys."""
    changed = list(served)
    for _ in range(draw(st.integers(0, 2))):
        lo, length = draw(st.integers(0, SIZE)), draw(st.integers(1, 8))
        key, offset = draw(st.sampled_from([HOLE, "a", "b", "c"])), draw(st.integers(0, 2))
        for position in range(lo, min(lo + length, SIZE)):
            changed[position] = HOLE if key is HOLE else (key, position + offset)
    table = draw(st.permutations(["a", "a", "b", "c", "unused"]))
    return changed, build(changed, base, table, draw(st.sets(st.integers(0, SIZE), max_size=4))), table


@settings(max_examples=500)
@given(st.data(), bases)
def test_merge(data, base):
    old, old_extents, old_keys = data.draw(sides(base, [HOLE] * SIZE))
    theirs, their_extents, their_keys = data.draw(sides(base, old))
    ours, our_extents, our_keys = data.draw(sides(base, old))
    three = list(zip(old, theirs, ours, strict=True))
    conflict = {p for p, (o, t, n) in enumerate(three) if o != t and o != n and t != n}
    arguments = (old_extents, old_keys, their_extents, their_keys, our_extents, our_keys)
    if conflict:
        with pytest.raises(ex.Overlap) as caught:
            ex.merge(*arguments)
        check_ranges(caught.value.ranges, conflict, base)
        return
    extents, table = ex.merge(*arguments)
    expected = [n if n != o else t for o, t, n in three]
    check(extents)
    names = [{"committed": their_keys, "new": our_keys}[side][index] for side, index in table]
    assert all(type(index) is int for _, index in table)
    assert model(extents, base, names) == expected
    assert sorted(names) == sorted({s[0] for s in expected if s is not HOLE})  # each once, only what is used
    assert extents.tolist() == ex.coalesce(extents).tolist()


def test_merge_of_nothing():
    extents, table = ex.merge(ex.empty(), [], ex.empty(), [], ex.empty(), [])
    assert len(extents) == 0
    assert table == []


def test_merge_keeps_a_hole_that_new_made():
    old, committed = ex.make([(0, 10, 0, 0)]), ex.make([(0, 8, 0, 0), (8, 10, 1, 0)])
    extents, table = ex.merge(old, ["x"], committed, ["x", "y"], ex.cut(old, 2, 4), ["x"])
    assert extents.tolist() == [(0, 2, 0, 0), (4, 8, 0, 4), (8, 10, 1, 0)]
    assert table == [("committed", 0), ("committed", 1)]


def test_overlap_says_what_and_survives_pickling():
    old, one, two = (ex.make([(0, 10, 0, offset)]) for offset in (0, 1, 2))
    with pytest.raises(ex.Overlap, match=r"10 bytes .* 0\.\.10") as caught:
        ex.merge(old, ["x"], one, ["x"], two, ["x"])
    assert pickle.loads(pickle.dumps(caught.value)).ranges.tolist() == [[0, 10]]


# -- the module


def test_many_extents_need_no_loop():
    """100,000 extents through everything, with results that are known in closed form."""
    count = 100_000
    extents = np.zeros(count, ex.EXTENT)
    extents["start"] = np.arange(count) * 10
    extents["stop"] = extents["start"] + 8
    extents["offset"] = extents["start"]
    frozen(extents)
    shifted = extents.copy()
    shifted["start"] += 4
    shifted["stop"] += 4
    assert len(ex.splice(extents, shifted)) == 2 * count
    assert ex.total(ex.holes(extents, 0, 10 * count)) == 2 * count
    assert len(ex.clip(extents, 5, 10 * count - 5)) == count
    assert ex.total(ex.diff(extents, ["x"], shifted, ["x"])) == 12 * count - 2 * (count - 1)
    merged, table = ex.merge(extents, ["x"], ex.cut(extents, 0, 10), ["x"], extents[:-1], ["x"])
    assert merged.tolist() == extents[1:-1].tolist()
    assert table == [("committed", 0)]


def test_doctests():
    result = doctest.testmod(ex)
    assert result.attempted > 20
    assert result.failed == 0


def test_all_names_exist():
    assert ex.__all__ == sorted(ex.__all__)
    assert all(hasattr(ex, name) for name in ex.__all__)
