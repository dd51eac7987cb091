"""Dirty pages are reduced to the elements that were changed: all of them, and as few others as can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_zbig.memory.plan import PAGE
from dask_zbig.storage import extents as ex
from dask_zbig.storage.sources import BytesSource
from dask_zbig.trim import EDGE, MAX_RANGES, compose, torn, trim

GRANULES = [1, 2, 3, 4, 7, 8, 12, 16, 100, 4095, 4096, 5000, 12288]


def trimmed(new, old, runs, granule):
    """The extents left of runs of pages [(start, stop)] that were written, when `old` had become `new`."""
    extents = ex.make([(a, b, 0, a) for a, b in runs])
    base = ex.make([(0, len(old), 0, 0)])
    return trim(extents, [BytesSource(new.tobytes())], base, [BytesSource(old.tobytes())], granule)


def marked(ranges, size):
    mask = np.zeros(size, bool)
    for lo, hi in ranges.tolist():
        mask[lo:hi] = True
    return mask


@st.composite
def writes(draw):
    """(old, new, runs of dirty pages, granule)."""
    granule = draw(st.sampled_from(GRANULES))
    size = draw(st.integers(1, 12)) * PAGE // granule * granule or granule
    old = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 4, size, "u1")
    new = old.copy()
    for _ in range(draw(st.integers(0, 12))):
        lo = draw(st.integers(0, size - 1))
        new[lo : lo + draw(st.sampled_from([1, 3, granule, PAGE, 3 * PAGE]))] ^= draw(st.integers(0, 3))
    pages = {int(p) // PAGE for p in np.flatnonzero(new != old)}
    pages |= draw(st.sets(st.integers(0, (size - 1) // PAGE), max_size=4))  # written, but not changed
    runs = [[p * PAGE, min((p + 1) * PAGE, size)] for p in sorted(pages)]
    joined = [runs[0]] if runs else []
    for run in runs[1:]:
        if joined[-1][1] == run[0] and draw(st.booleans()):
            joined[-1][1] = run[1]
        else:
            joined.append(run)
    return old, new, joined, granule


@given(writes())
def test_what_is_claimed_is_what_was_changed(write):
    old, new, runs, granule = write
    got = trimmed(new, old, runs, granule)
    claimed = marked(ex.covered(got), len(old))
    dirty = marked(np.array(runs, np.int64).reshape(-1, 2), len(old))
    changed = np.repeat((new != old).reshape(-1, granule).any(axis=1), granule)  # by element
    parts = marked(torn(got, granule), len(old))
    assert not (claimed & ~dirty).any()
    if granule <= PAGE:
        np.testing.assert_array_equal(claimed | parts, changed)
        assert not (claimed & parts).any()
    else:  # of each run the part of the element
        want = np.zeros(len(old), bool)
        for lo, hi in runs:
            elements = np.arange(lo, hi) // granule
            want[lo:hi] = np.isin(elements, elements[new[lo:hi] != old[lo:hi]])
        np.testing.assert_array_equal(claimed, want)
        assert not parts.any()
    # and each byte comes from its place in the scratch file
    np.testing.assert_array_equal(got["offset"], got["start"])


@given(writes(), writes())
def test_who_changes_one_element_conflicts_and_who_changes_others_does_not(one, other):
    old, mine, my_runs, granule = one
    _, theirs, _, _ = other
    theirs = np.resize(theirs, len(old))
    pages = [[p, min(p + PAGE, len(old))] for p in range(0, len(old), PAGE)]
    their_runs = [run for run in pages if (theirs[slice(*run)] != old[slice(*run)]).any()]
    claims = [trimmed(new, old, runs, granule) for new, runs in ((mine, my_runs), (theirs, their_runs))]
    bytes_of = [ex.union(ex.covered(c), torn(c, granule)) for c in claims]
    elements = [(new != old).reshape(-1, granule).any(axis=1) for new in (mine, theirs)]
    if granule <= PAGE:
        assert bool(len(ex.intersect(*bytes_of))) == bool((elements[0] & elements[1]).any())


@pytest.mark.parametrize("granule", [1, 8, 12, 4096])
def test_of_a_long_run_only_the_ends_are_compared(granule):
    size = 4 * EDGE // granule * granule
    old = np.zeros(size, "u1")
    new = old.copy()
    new[3 * granule : size - 5 * granule] = 1
    got = ex.covered(trimmed(new, old, [(0, size)], granule))
    assert got.tolist() == [[3 * granule, size - 5 * granule]]


def scattered(count, apart=2, granule=8):
    """What is claimed when every `apart`-th element of a run is changed, `count` times."""
    size = -(-count * apart * granule // PAGE) * PAGE
    old = np.zeros(size, "u1")
    new = old.copy()
    new.view(f"u{granule}")[: count * apart : apart] = 1
    return ex.covered(trimmed(new, old, [(0, size)], granule))


@pytest.mark.parametrize("count", [1, 512, 513, MAX_RANGES])
def test_separate_changes_are_claimed_separately(count):
    assert scattered(count).tolist() == [[k * 16, k * 16 + 8] for k in range(count)]


@pytest.mark.parametrize("count", [MAX_RANGES + 1, 5 * MAX_RANGES])
def test_very_many_are_joined(count):
    assert scattered(count).tolist() == [[0, count * 16 - 8]]


def test_the_closest_are_joined_first():
    old = np.zeros(3 * EDGE // 2, "u1")
    new = old.copy()
    new[: 4 * MAX_RANGES : 2] = 1
    new[EDGE::1000] = 1
    got = ex.covered(trimmed(new, old, [(0, len(old))], 1)).tolist()
    assert got[0] == [0, 4 * MAX_RANGES - 1]
    assert got[1:] == [[k, k + 1] for k in range(EDGE, len(old), 1000)]


def test_a_long_run_in_which_every_other_element_was_changed():
    assert scattered(EDGE).tolist() == [[0, 16 * EDGE - 8]]


def test_compose():
    extents = ex.make([(5, 8, 0, 1), (8, 9, 1, 0), (12, 14, 0, 0)])
    sources = [BytesSource(b"abcd"), BytesSource(b"z")]
    assert compose(extents, sources, 4, 13) == b"\0bcdz\0\0\0a"


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 2), st.integers(0, 30_000)),
        min_size=1,
        max_size=30,
    )
)
def test_compose_many_pieces(pieces):
    """Of several sources, in any order, near each other or far, overlapping in them or not."""
    data = [np.random.default_rng(i).integers(0, 256, 40_000, "u1").tobytes() for i in range(3)]
    rows, at = [], 0
    for gap, size, index, offset in pieces:
        rows.append((at + gap, at + gap + size, index, offset))
        at += gap + size
    expected = bytearray(at + 10)
    for start, stop, index, offset in rows:
        expected[start:stop] = data[index][offset : offset + stop - start]
    sources = [BytesSource(x) for x in data]
    assert compose(ex.make(rows), sources, 0, at + 10) == expected
    assert compose(ex.make(rows), sources, 1, at) == expected[1:at]


def test_certain_ranges_count_as_changed():
    old, new = np.zeros(2 * PAGE, "u1"), np.zeros(2 * PAGE, "u1")
    new[100:108] = 1
    extents = ex.make([(PAGE, 3 * PAGE, 0, 0)])
    base = ex.make([(PAGE, 3 * PAGE, 0, 0)])
    sources = [BytesSource(new.tobytes())], base, [BytesSource(old.tobytes())]
    assert trim(extents, *sources, 8)[["start", "stop"]].tolist() == [(PAGE + 96, PAGE + 112)]
    certain = [(0, 50), (PAGE, PAGE + 16), (PAGE + 112, PAGE + 120), (3 * PAGE - 8, 4 * PAGE)]
    found = trim(extents, *sources, 8, certain)
    expected = [(PAGE, PAGE + 16), (PAGE + 96, PAGE + 120), (3 * PAGE - 8, 3 * PAGE)]
    assert found[["start", "stop"]].tolist() == expected
