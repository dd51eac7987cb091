"""How a range of a file is to appear in memory: which pages are mapped from which file. Pure.

A page can be mapped straight from a segment's file if all of it comes from there, at the same offset modulo
the page size. Pages made of several pieces (of different segments, of bytes held in objects, of data and
hole) must be *composed*: their bytes are copied together into a cache file, which is mapped instead. So
are short runs, because a mapping costs more than a copy of a few pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dask_zbig.descriptors import Descriptor

__all__ = ["Piece", "Source", "batches", "composed", "plan"]

PAGE, BLOCK = 4096, 2 << 20
#: Shorter runs are copied rather than mapped: 64 KiB.
MIN_DIRECT = 16 * PAGE


class Source(Protocol):
    """Where bytes come from: a segment or a scratch file.

    All methods may be called from any thread, without the user's Connection, and raise `LoadError`.
    """

    @property
    def length(self) -> int:
        """Number of bytes."""

    @property
    def in_file(self) -> bool:
        """Whether a file holds the bytes, so that they can be mapped."""

    def local(self) -> bool:
        """Whether the bytes can be had without asking a server."""

    def descriptor(self) -> Descriptor | None:
        """That file, open for as long as the result lives; or None if there is no such file."""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Pages [start, stop) of the file.

    A hole if `kind` is "hole", mapped from `source` at `offset` if "direct", else to be composed.
    """

    start: int
    stop: int
    kind: str
    source: int = -1
    offset: int = 0


def composed(extents: npt.NDArray[np.void], sources: Sequence[Source]) -> npt.NDArray[np.int64]:
    """Of each extent, about how many bytes must be copied because they cannot be mapped."""
    size = (extents["stop"] - extents["start"]).astype(np.int64)
    files = np.array([source.in_file for source in sources], np.bool_)
    direct = (extents["start"] - extents["offset"]) % np.uint64(PAGE) == 0
    direct &= size >= MIN_DIRECT
    if len(extents):
        direct &= files[extents["segment"]]
    return np.where(direct, 0, size)


def _down(x: int) -> int:
    return x - x % PAGE


def _up(x: int) -> int:
    return -(-x // PAGE) * PAGE


def _direct(
    extents: npt.NDArray[np.void], sources: Sequence[Source], lo: int, hi: int
) -> Iterator[tuple[int, int, int, int]]:
    """The stretches (start, stop, source, offset) that can be mapped straight from files."""
    starts, stops = extents["start"], extents["stop"]
    fit = (starts - extents["offset"]) % np.uint64(PAGE) == 0
    fit &= stops - starts >= MIN_DIRECT
    rows = extents[fit].tolist()
    after = np.append(starts[1:], np.uint64(hi))[fit].tolist()
    for (start, stop, index, offset), next_start in zip(rows, after, strict=True):
        source = sources[index]
        first, last = _up(start), _down(stop)
        ends_file = offset + (stop - start) == source.length
        if ends_file and last < stop <= hi and next_start >= _up(stop):
            last = _up(stop)  # the kernel shows zeros after a file's end, as the hole there wants
        first, last = max(first, lo), min(last, hi)
        if last - first < MIN_DIRECT or not source.in_file:
            continue
        yield first, last, index, offset + (first - start)


def _touched(extents: npt.NDArray[np.void]) -> Iterator[tuple[int, int]]:
    """The runs of pages that some extent touches."""
    if not len(extents):
        return iter(())
    page = np.uint64(PAGE)
    firsts, lasts = extents["start"] // page * page, (extents["stop"] + (page - np.uint64(1))) // page * page
    apart = np.flatnonzero(firsts[1:] > lasts[:-1])
    return zip(firsts[np.append(0, apart + 1)].tolist(), lasts[np.append(apart, -1)].tolist(), strict=True)


def plan(extents: npt.NDArray[np.void], sources: Sequence[Source], lo: int, hi: int) -> list[Piece]:
    """Cover [lo, hi) by pieces.

    Parameters
    ----------
    extents
        Sorted and disjoint (see `dask_zbig.storage.extents`), within [lo, hi).
    sources
        By the extents' segment index.
    lo, hi
        Multiples of the page size.

    Returns
    -------
    list of Piece
        Sorted, adjacent, covering [lo, hi).
    """
    direct = list(_direct(extents, sources, lo, hi))
    pieces: list[Piece] = []
    at, d = lo, 0
    for first, last in _touched(extents):  # what `direct` leaves of these is to be composed
        if at < first:
            pieces.append(Piece(at, first, "hole"))
            at = first
        while d < len(direct) and direct[d][0] < last:
            start, stop, index, offset = direct[d]
            if at < start:
                pieces.append(Piece(at, start, "compose"))
            pieces.append(Piece(start, stop, "direct", index, offset))
            at, d = stop, d + 1
        if at < last:
            pieces.append(Piece(at, last, "compose"))
            at = last
    if at < hi:
        pieces.append(Piece(at, hi, "hole"))
    return pieces


def batches(pieces: Sequence[Piece], lo: int, hi: int, most: int) -> Iterator[tuple[int, int, list[Piece]]]:
    """Split a plan of [lo, hi), whole blocks, into runs of blocks that map `most` files, or are one block.

    Yields
    ------
    start, stop, pieces
        The pieces cover [start, stop).
    """
    files = [p.stop for p in pieces if p.kind == "direct"]
    starts = [p.start for p in pieces if p.kind == "direct"]
    first = file = 0  # the first piece, and file, that has not been passed
    while lo < hi:
        while file < len(files) and files[file] <= lo:
            file += 1
        end = hi
        if file + most < len(files):
            end = max(starts[file + most] // BLOCK * BLOCK, lo + BLOCK)
        while pieces[first].stop <= lo:
            first += 1
        last = first
        while last < len(pieces) and pieces[last].start < end:
            last += 1
        yield lo, end, [_cut(p, lo, end) for p in pieces[first:last]]
        lo = end


def _cut(p: Piece, lo: int, hi: int) -> Piece:
    start, stop = max(p.start, lo), min(p.stop, hi)
    return replace(p, start=start, stop=stop, offset=p.offset + (start - p.start) if p.kind == "direct" else 0)
