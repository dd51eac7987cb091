"""What is mapped from where: for any extents, pages planned so show the bytes that the extents describe."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_zbig.memory.plan import BLOCK, MIN_DIRECT, PAGE, Piece, batches, plan
from dask_zbig.storage import extents as ex

PAGES = 64


class Fake:
    """A source with random bytes, in a file or not."""

    def __init__(self, number, length, in_file):
        self.data = np.random.default_rng(number).integers(1, 256, length, "u1").tobytes()
        self.length = length
        self.in_file = in_file

    def local(self):
        return True

    def read(self, offset, size):
        assert offset + size <= self.length
        return self.data[offset : offset + size]


def shown(pieces, extents, sources, lo, hi):
    """The bytes that memory would show, and what the extents say."""
    wanted = np.zeros(hi - lo, "u1")
    for start, stop, index, offset in extents.tolist():
        wanted[start - lo : stop - lo] = np.frombuffer(sources[index].read(offset, stop - start), "u1")
    got = np.full(hi - lo, 255, "u1")
    for piece in pieces:
        a, b = piece.start - lo, piece.stop - lo
        if piece.kind == "hole":
            got[a:b] = 0
        elif piece.kind == "direct":
            data = sources[piece.source].data[piece.offset : piece.offset + b - a]
            got[a:b] = np.frombuffer(data.ljust(b - a, b"\0"), "u1")  # as the kernel does, up to a page's end
        else:
            got[a:b] = wanted[a:b]
    return got, wanted


@st.composite
def layouts(draw):
    """Extents over PAGES pages, most of them such that something can be mapped straight from a file."""
    rows, sources, at = [], [], 0
    for number in range(draw(st.integers(0, 6))):
        edge = st.sampled_from([0, 0, 1, 100, PAGE - 1])
        start = at + draw(st.integers(0, 4)) * PAGE + draw(edge)
        size = draw(st.integers(0, 30)) * PAGE + draw(edge) + draw(st.sampled_from([0, 1]))
        stop = min(start + size, PAGES * PAGE)
        if start >= stop:
            break
        skew = draw(st.sampled_from([0, 0, 0, 7]))
        offset = start % PAGE + skew + draw(st.integers(0, 2)) * PAGE
        spare = draw(st.sampled_from([0, 0, 1, PAGE]))
        sources.append(Fake(number, offset + stop - start + spare, draw(st.integers(0, 3)) > 0))
        rows.append((start, stop, number, offset))
        at = stop
    return ex.make(rows), sources


@given(layouts())
def test_plan_shows_what_extents_say(layout):
    extents, sources = layout
    pieces = plan(extents, sources, 0, PAGES * PAGE)
    edges = [p.start for p in pieces] + [pieces[-1].stop]
    assert edges == [0, *[p.stop for p in pieces]]
    assert edges[-1] == PAGES * PAGE
    assert sorted(set(edges)) == edges
    for piece in pieces:
        assert piece.start % PAGE == piece.stop % PAGE == 0
        if piece.kind == "direct":
            assert piece.offset % PAGE == 0
            assert sources[piece.source].in_file
            # a page wholly past a file's end would be a SIGBUS
            assert piece.offset + piece.stop - piece.start < sources[piece.source].length + PAGE
    got, wanted = shown(pieces, extents, sources, 0, PAGES * PAGE)
    np.testing.assert_array_equal(got, wanted)


@given(layouts(), st.integers(0, PAGES - 1), st.integers(1, PAGES))
def test_plan_of_a_part(layout, first, count):
    extents, sources = layout
    lo, hi = first * PAGE, min(first + count, PAGES) * PAGE
    part = ex.clip(extents, lo, hi)
    got, wanted = shown(plan(part, sources, lo, hi), part, sources, lo, hi)
    np.testing.assert_array_equal(got, wanted)


def spread(draw):
    """A plan of some blocks in which anything may lie beside anything."""
    pieces, at, blocks = [], 0, draw(st.integers(1, 6))
    for index in range(draw(st.integers(0, 40))):
        stop = min(at + draw(st.integers(1, 1000)) * PAGE, blocks * BLOCK)
        kind = draw(st.sampled_from(["hole", "direct", "direct", "compose"]))
        pieces.append(Piece(at, stop, kind, *((index, 7 * PAGE) if kind == "direct" else ())))
        at = stop
        if at == blocks * BLOCK:
            break
    if at < blocks * BLOCK:
        pieces.append(Piece(at, blocks * BLOCK, "hole"))
    return pieces, blocks * BLOCK


@given(st.composite(spread)(), st.integers(1, 8))
def test_batches_are_the_plan_in_parts(plan_and_end, most):
    pieces, end = plan_and_end
    at, seen = 0, []
    for lo, hi, some in batches(pieces, 0, end, most):
        assert lo == at < hi
        assert hi % BLOCK == 0
        assert some[0].start == lo
        assert some[-1].stop == hi
        assert sum(p.kind == "direct" for p in some) <= most or hi - lo == BLOCK
        seen += some
        at = hi
    assert at == end

    def pages(parts):
        return [
            (p.kind, p.source, p.offset + at - p.start if p.kind == "direct" else 0)
            for p in parts
            for at in range(p.start, p.stop, PAGE)
        ]

    assert pages(seen) == pages(pieces)


def test_nothing_is_one_hole():
    assert plan(ex.empty(), [], 0, 1 << 40) == [Piece(0, 1 << 40, "hole")]


def test_aligned_file_is_one_mapping():
    size = MIN_DIRECT
    assert plan(ex.make([(0, size, 0, PAGE)]), [Fake(0, PAGE + size, True)], 0, size) == [
        Piece(0, size, "direct", 0, PAGE)
    ]


def test_last_page_of_a_file_is_mapped_whole():
    """A file that ends inside of a page: zeros follow, as they should."""
    size = MIN_DIRECT + 10
    assert plan(ex.make([(0, size, 0, 0)]), [Fake(0, size, True)], 0, 2 * MIN_DIRECT) == [
        Piece(0, MIN_DIRECT + PAGE, "direct", 0, 0),
        Piece(MIN_DIRECT + PAGE, 2 * MIN_DIRECT, "hole"),
    ]


@pytest.mark.parametrize("row", [(0, MIN_DIRECT, 0, 1), (0, MIN_DIRECT - PAGE, 0, 0)], ids=["skewed", "short"])
def test_what_cannot_be_mapped_is_composed(row):
    pieces = plan(ex.make([row]), [Fake(0, 2 * MIN_DIRECT, True)], 0, MIN_DIRECT)
    assert pieces[0].kind == "compose"
    assert "direct" not in [p.kind for p in pieces]


def test_bytes_in_memory_are_composed():
    pieces = plan(ex.make([(0, MIN_DIRECT, 0, 0)]), [Fake(0, MIN_DIRECT, False)], 0, MIN_DIRECT)
    assert pieces == [Piece(0, MIN_DIRECT, "compose")]
