"""The table of an extent leaf, as few bytes as it takes: columns that say what the rows before do not, compressed.

Pure. A leaf is written again by every commit that changes it, so its record is most of what a small commit writes. As
rows of numbers (format 1) an extent takes 28 bytes; here, among others, one of 8 bytes takes about 5, and one of many
that follow each other nearly nothing. `dask_zbig.storage.format` has the rules.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.errors import FormatError
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import LEAF_BYTES

__all__ = ["MOVED", "SEGMENT", "pack", "unpack"]

SEGMENT = np.dtype([("length", "<u8"), ("checksum", "<u8")])
#: Bytes [start, stop) were in the segment of this oid, from `offset` on.
MOVED = np.dtype([("start", "<u8"), ("stop", "<u8"), ("oid", "S8"), ("offset", "<u8")])

_HEADER = struct.Struct("<QIIB")
_ROW = np.dtype([("gap", "<u4"), ("length", "<u4"), ("segment", "<u4"), ("offset", "<u8")])
_MOVED_ROW = np.dtype([("gap", "<u4"), ("length", "<u4"), ("oid", "<u8"), ("offset", "<u8")])
_LEAVES = 1 << 37
#: A table of so few extents and segments is made, and read, number by number: NumPy's calls would take five times as
#: long. What comes out is the same.
FEW = 72
_ONE_ROW = struct.Struct("<IIIQ")
_WORD = (1 << 64) - 1
_LEVEL = 3  # half the time of 6, for a few bytes more
_ZERO = np.zeros(1, np.uint64)


def pack(
    extents: ex.Extents, segments: npt.NDArray[np.void], to: bytes, moved: npt.NDArray[np.void], age: int
) -> bytes:
    """The table of a leaf.

    Parameters
    ----------
    extents
        Of one leaf: sorted and disjoint.
    segments : array of SEGMENT
    to, moved, age
        The oid of the segment that bytes were joined into, or b""; where they were (MOVED), sorted and disjoint; and
        how many commits ago that was.
    """
    if not len(extents) and not len(segments):
        return b""
    if not len(moved):
        to = b""
    base = int(extents["start"][0]) // LEAF_BYTES * LEAF_BYTES if len(extents) else 0
    columns = _pack_few if len(extents) <= FEW and len(segments) <= FEW else _pack_many
    parts = columns(extents, segments["length"], base)
    if to:
        before = np.empty(len(moved), _MOVED_ROW)
        _pack_places(before, moved, base)
        before["oid"] = np.diff(np.ascontiguousarray(moved["oid"]).view(">u8").astype(np.uint64), prepend=_ZERO)
        before["offset"] = moved["offset"]
        parts.append(_planes(before))
    header = _HEADER.pack(base // LEAF_BYTES, len(extents), len(moved) if to else 0, age)
    compressed = zlib.compress(b"".join(parts), _LEVEL)
    return b"".join([header, to.ljust(8, b"\0") if to else b"", segments["checksum"].tobytes(), compressed])


def unpack(table: bytes, count: int) -> tuple[ex.Extents, npt.NDArray[np.void], bytes, npt.NDArray[np.void], int]:
    """What was packed, of a leaf that refers to `count` segments.

    The rows are not checked, but for what `pack` could not have said at all.

    Raises
    ------
    FormatError
        If this is no table of so many segments.
    """
    if not table and not count:
        return ex.empty(), np.empty(0, SEGMENT), b"", np.empty(0, MOVED), 0
    if len(table) < _HEADER.size:
        raise FormatError(f"has a table of {len(table)} bytes")
    leaf, n, k, age = _HEADER.unpack_from(table)
    if leaf >= _LEAVES or n > LEAF_BYTES or k > LEAF_BYTES:
        raise FormatError(f"has a table of {n} extents and {k} moved runs for leaf {leaf}")
    at = _HEADER.size
    to = table[at : at + 8] if k else b""
    at += len(to)
    sizes = [n * _ROW.itemsize, count * 8, count, k * _MOVED_ROW.itemsize]
    columns = _decompressed(table[at + 8 * count :], sum(sizes))
    base = leaf * LEAF_BYTES
    extents, lengths = (_unpack_few if n <= FEW and count <= FEW else _unpack_many)(columns, n, count, base)
    segments = np.empty(count, SEGMENT)
    segments["length"] = lengths
    segments["checksum"] = np.frombuffer(table, "<u8", count, at)
    moved = np.empty(k, MOVED)
    if k:
        before = _rows(columns[sum(sizes[:3]) :], _MOVED_ROW)
        _unpack_places(moved, before, base)
        moved["oid"] = np.cumsum(before["oid"], dtype=np.uint64).astype(">u8").view("S8")
        moved["offset"] = before["offset"]
    extents.flags.writeable = False
    return extents, segments, to, moved, age


def _pack_many(extents: ex.Extents, lengths: npt.NDArray[np.uint64], base: int) -> list[bytes]:
    """The columns of extents and segments."""
    steps, follows = _steps(extents, len(lengths))
    rows = np.empty(len(extents), _ROW)
    _pack_places(rows, extents, base)
    rows["segment"] = _codes(extents["segment"])
    rows["offset"] = extents["offset"] - steps
    return [_planes(rows), _planes(lengths), follows.tobytes()]


def _unpack_many(columns: bytes, n: int, count: int, base: int) -> tuple[ex.Extents, npt.NDArray[np.uint64]]:
    """The extents, and the lengths of the segments."""
    ends = [n * _ROW.itemsize, n * _ROW.itemsize + count * 8]
    rows = _rows(columns[: ends[0]], _ROW)
    extents = np.empty(n, ex.EXTENT)
    _unpack_places(extents, rows, base)
    extents["segment"] = _segments(rows["segment"])
    if n and extents["segment"].max() >= count:
        raise FormatError(f"has an extent of segment {extents['segment'].max()}, of {count}")
    extents["offset"] = _offsets(extents, rows["offset"], np.frombuffer(columns, "u1", count, ends[1]))
    return extents, _rows(columns[ends[0] : ends[1]], np.dtype("<u8"))


def _pack_few(extents: ex.Extents, lengths: npt.NDArray[np.uint64], base: int) -> list[bytes]:
    """As `_pack_many`."""
    rows = extents.tolist()
    last: dict[int, tuple[int, int, int]] = {}  # of each segment that was met, in that order: its extent before
    behind, apart = [0] * len(lengths), [0] * len(lengths)  # how often each expectation would hold
    for start, stop, segment, offset in rows:
        if segment in last:
            a, b, o = last[segment]
            behind[segment] += offset == (o + b - a) & _WORD
            apart[segment] += offset == (o + start - a) & _WORD
        last[segment] = start, stop, offset
    follows = bytes(b > a for b, a in zip(behind, apart, strict=True))
    in_order = list(last) == list(range(len(last)))
    last.clear()
    packed, at = [], base
    for start, stop, segment, offset in rows:
        step = 0
        if segment in last:
            a, b, o = last[segment]
            step = o + (b - a if follows[segment] else start - a)
        code = 0 if in_order and segment not in last else segment + 1
        packed.append(_ONE_ROW.pack(start - at, stop - start, code, (offset - step) & _WORD))
        last[segment] = start, stop, offset
        at = stop
    return [_turned(b"".join(packed), _ROW.itemsize), _turned(lengths.tobytes(), 8), follows]


def _turned(rows: bytes, width: int) -> bytes:
    """As `_planes`."""
    return b"".join([rows[k::width] for k in range(width)])


def _unpack_few(columns: bytes, n: int, count: int, base: int) -> tuple[ex.Extents, Sequence[int]]:
    """As `_unpack_many`."""
    ends = [n * _ROW.itemsize, n * _ROW.itemsize + count * 8]
    found, met, at, most = [], 0, base, -1
    for i in range(n):
        gap, length, code, residue = _ONE_ROW.unpack(columns[i : ends[0] : n])
        segment = code - 1 if code else met
        met += not code
        most = max(most, segment)
        found.append((at + gap, at + gap + length, segment, residue))
        at += gap + length
    if most >= count:
        raise FormatError(f"has an extent of segment {most}, of {count}")
    follows, rows = columns[ends[1] : ends[1] + count], []
    last: dict[int, tuple[int, int, int]] = {}
    for start, stop, segment, offset in found:
        if segment in last:
            a, b, o = last[segment]
            offset = (offset + o + (b - a if follows[segment] else start - a)) & _WORD
        last[segment] = start, stop, offset
        rows.append((start, stop, segment, offset))
    lengths = [int.from_bytes(columns[ends[0] + i : ends[1] : count], "little") for i in range(count)]
    return np.array(rows, ex.EXTENT), lengths


def _decompressed(data: bytes, size: int) -> bytes:
    """Exactly so many bytes; whatever it is, it makes no more of them than that."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, size) if size else stream.decompress(data, 1)
        more = b"" if stream.eof else stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as e:
        raise FormatError(f"has a table that cannot be decompressed: {e}") from None
    if len(found) != size or more or not stream.eof or stream.unused_data:
        raise FormatError(f"has a table that is not of the {size} bytes that it should be")
    return found


# -- columns: byte 0 of all rows, byte 1 of all rows, ...: those that are all the same take no space


def _planes(rows: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize).T.tobytes()


def _rows(planes: bytes, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    count = len(planes) // dtype.itemsize
    turned = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, count).T)
    return turned.view(dtype).reshape(count)


def _pack_places(rows: npt.NDArray[np.void], places: npt.NDArray[np.void], base: int) -> None:
    starts, stops = places["start"], places["stop"]
    gaps = starts.copy()
    gaps[1:] -= stops[:-1]
    gaps[:1] -= np.uint64(base)
    rows["gap"] = gaps
    rows["length"] = stops - starts


def _unpack_places(places: npt.NDArray[np.void], rows: npt.NDArray[np.void], base: int) -> None:
    lengths = rows["length"].astype(np.uint64)
    stops = np.cumsum(rows["gap"] + lengths) + np.uint64(base)
    places["start"], places["stop"] = stops - lengths, stops


# -- segments: 0 is the first one that was not met before, and n + 1 is segment n


def _codes(segments: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    codes = segments + np.uint32(1)
    if len(segments):
        most = np.maximum.accumulate(segments)
        new = np.ones(len(segments), np.bool_)
        np.not_equal(most[1:], most[:-1], out=new[1:])
        met = most[new]
        if met[0] == 0 and met[-1] == len(met) - 1:  # each of them follows the one before
            codes[new] = 0
    return codes


def _segments(codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    new = codes == 0
    return np.where(new, np.cumsum(new, dtype=np.uint32), codes) - np.uint32(1)


# -- offsets: of a segment's second extent and those after it, where one would expect them


def _steps(extents: ex.Extents, count: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """Where each extent is expected in its segment, and, for each segment, which expectation it is that holds.

    0: as far from the one before as in the file (of it something was overwritten); 1: behind the one before (it was
    packed).
    """
    expected = np.zeros(len(extents), np.uint64)
    follows = np.zeros(count, np.uint8)
    order = _by_segment(extents["segment"])
    rows = extents.take(order)
    again = rows["segment"][1:] == rows["segment"][:-1]
    if again.any():
        owners, starts, stops, offsets = (
            np.ascontiguousarray(rows[field]) for field in ("segment", "start", "stop", "offset")
        )
        owners, shifts = owners[1:], offsets[:-1] - starts[:-1]
        apart, behind = shifts + starts[1:], shifts + stops[:-1]
        better = np.bincount(owners[again & (behind == offsets[1:])], minlength=count)
        follows[better > np.bincount(owners[again & (apart == offsets[1:])], minlength=count)] = 1
        expected[order[1:]] = np.where(follows[owners], behind, apart) * again
    return expected, follows


def _offsets(
    extents: ex.Extents, residues: npt.NDArray[np.uint64], follows: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint64]:
    """The inverse: what is to be added to `residues`, one extent of a segment after the other."""
    order = _by_segment(extents["segment"])
    again = _repeated(extents["segment"][order])
    added = residues[order].astype(np.uint64)
    if len(again):
        starts, stops = extents["start"][order], extents["stop"][order]
        before = again - 1
        behind = follows[extents["segment"][order[again]]] != 0
        added[again] += np.where(behind, stops[before] - starts[before], starts[again] - starts[before])
        sums = np.cumsum(added)
        first = np.ones(len(added), np.bool_)
        first[again] = False
        heads = np.flatnonzero(first)
        added = sums - np.repeat(sums[heads] - added[heads], np.diff(heads, append=len(added)))
    offsets = np.empty(len(added), np.uint64)
    offsets[order] = added
    return offsets


def _by_segment(segments: npt.NDArray[np.uint32]) -> npt.NDArray[np.intp]:
    """The order by segment, then position."""
    small = segments.astype(np.uint16) if len(segments) and segments.max() < 1 << 16 else segments  # sorts by radix
    return small.argsort(kind="stable")


def _repeated(ordered: npt.NDArray[np.uint32]) -> npt.NDArray[np.intp]:
    """The places of those that are not the first of their segment."""
    return np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
