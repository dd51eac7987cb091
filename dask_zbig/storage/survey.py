"""What an extent map says of a file without reading any of its data: how much is stored, where, and in what pieces.

A large file has many leaves, each of which may have to be fetched from a server. So a survey may be bounded: the file
is divided into bins, and of each the first few leaves are looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.segment import SegmentRef
from dask_zbig.storage.tree import ExtentLeaf, ZBigFile, checked

__all__ = ["SegmentUse", "Survey", "stored_ranges", "survey"]


@dataclass(slots=True)
class SegmentUse:
    """A segment, and how many of its bytes the file still shows."""

    ref: SegmentRef
    live: int = 0


@dataclass(slots=True)
class Survey:
    """What was found in the bytes [0, size).

    Attributes
    ----------
    exact : bool
        Whether all leaves were looked at. If not, the numbers are lower bounds.
    leaves : int
        The leaves that were looked at.
    stored : int
        Bytes in extents; all others are zeros that take no space.
    extents : int
        Contiguous runs of bytes, each of one segment.
    fullest : int
        How many of them the leaf has that has most.
    segments : dict
        `SegmentUse` by the segment's key.
    bins : tuple of float
        The file in equal parts: how much of each is stored, 0 to 1, as far as it was looked at.
    serials : dict
        How many of the objects looked at were last changed by the transaction of this id.
    """

    size: int
    exact: bool = True
    leaves: int = 0
    stored: int = 0
    extents: int = 0
    fullest: int = 0
    segments: dict[Any, SegmentUse] = field(default_factory=dict)
    bins: tuple[float, ...] = ()
    serials: dict[bytes, list[Any]] = field(default_factory=dict)

    def kind(self, *, inline: bool) -> tuple[int, int, int]:
        """Of inline segments, or of blobs: how many there are, their bytes, and how many of these are live."""
        some = [use for use in self.segments.values() if use.ref.inline is inline]
        return len(some), sum(use.ref.length for use in some), sum(use.live for use in some)


def survey(file: ZBigFile, size: int, *, bins: int = 1, per_bin: int | None = None) -> Survey:
    """Look at the extent map of [0, size).

    Parameters
    ----------
    bins : int
        Into how many parts it is divided.
    per_bin : int or None
        Of how many leaves of each part at most; None: all.

    Raises
    ------
    FormatError, ZODB.POSException.POSError
        If the map cannot be read.

    Notes
    -----
    To be called as persistent objects are used: by one thread at a time.
    """
    found = Survey(size)
    fractions = []
    last = -1
    for lo, hi in bins_of(size, bins):
        stored, upto = 0, hi
        some = file.leaves(lo, hi) if per_bin is None else itertools.islice(file.leaves(lo, hi), per_bin + 1)
        for count, (index, leaf) in enumerate(some):
            if per_bin is not None and count == per_bin:
                found.exact, upto = False, index * LEAF_BYTES
                break
            extents = checked(leaf, index).extents
            if index > last:
                _note(found, leaf, size)
                last = index
            stored += ex.total(ex.covered(ex.clip(extents, lo, hi)))
        fractions.append(stored / (upto - lo) if upto > lo else 0.0)
    found.bins = tuple(fractions)
    return found


def bins_of(size: int, count: int) -> list[tuple[int, int]]:
    """[0, size) in `count` parts of nearly the same size, or of one byte."""
    edges = sorted({size * i // count for i in range(count + 1)})
    return list(itertools.pairwise(edges))


def _note(found: Survey, leaf: ExtentLeaf, size: int) -> None:
    extents = ex.clip(leaf.extents, 0, size)
    live = np.zeros(len(leaf.refs), np.int64)
    np.add.at(live, extents["segment"], (extents["stop"] - extents["start"]).astype(np.int64))
    for ref, n in zip(leaf.refs, live.tolist(), strict=True):
        if n:
            found.segments.setdefault(ref.key, SegmentUse(ref)).live += n
    found.leaves += 1
    found.stored += int(live.sum())
    found.extents += len(extents)
    found.fullest = max(found.fullest, len(extents))
    found.serials.setdefault(leaf._p_serial, []).append(leaf._p_oid)


def stored_ranges(file: ZBigFile, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """The runs of bytes in [lo, hi) that are stored, ascending."""
    for index, leaf in file.leaves(lo, hi):
        yield from ex.covered(ex.clip(checked(leaf, index).extents, lo, hi)).tolist()
