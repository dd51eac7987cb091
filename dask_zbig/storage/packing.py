"""The table of an extent leaf, as few bytes as it takes: columns that say what the rows before do not, compressed.

Pure. A leaf is written again by every commit that changes it, so its record is most of what a small commit writes, and
to make it was the most of what that did: so its columns are made in C (csrc/table.c), and read, but for those of what
was moved. As rows of numbers (format 1) an extent takes 28 bytes; here, among others, one of 8 bytes takes about 5, and
one of many that follow each other nearly nothing. `dask_zbig.storage.format` has the rules.

Columns are byte 0 of all rows, byte 1 of all rows, and so on: those that are all the same take no space. A row is the
distance to the extent before, the length, a segment and an offset. The segment is 0 if it is the first one that was not
met before, else its number and 1. The offset is as far as it is from where one expects it, from a segment's second
extent on: as far from the one before as in the file (of it something was overwritten), or, if the segment's byte in
the last column is 1, behind the one before (it was packed).
"""

from __future__ import annotations

import errno
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.compiled import compiled
from dask_zbig.errors import FormatError
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import LEAF_BYTES

__all__ = ["MOVED", "SEGMENT", "pack", "put", "unpack"]

SEGMENT = np.dtype([("length", "<u8"), ("checksum", "<u8")])
#: Bytes [start, stop) were in the segment of this oid, from `offset` on.
MOVED = np.dtype([("start", "<u8"), ("stop", "<u8"), ("oid", "S8"), ("offset", "<u8")])

_HEADER = struct.Struct("<QIIB")
_MOVED_ROW = np.dtype([("gap", "<u4"), ("length", "<u4"), ("oid", "<u8"), ("offset", "<u8")])
_LEAVES = 1 << 37
_lib: Any
_ffi: Any
_ffi, _lib = compiled("dask_zbig.storage._table")
_ROW_BYTES: int = _lib.ZT_ROW
# (made here for the reason that `compiled` has)
_WORDS, _NUMBERS, _WORD, _SIZE = (_ffi.typeof(t) for t in ("uint64_t[]", "uint32_t[]", "uint64_t *", "size_t *"))
_LEVEL = 3  # half the time of 6, for a few bytes more


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

    Raises
    ------
    FormatError
        If the extents are of several leaves, or of other segments.
    """
    if not len(extents) and not len(segments):
        return b""
    if not len(moved):
        to = b""
    base = int(extents["start"][0]) // LEAF_BYTES * LEAF_BYTES if len(extents) else 0
    if len(extents) and int(extents["stop"][-1]) - base > LEAF_BYTES:
        raise FormatError(f"has extents up to {extents['stop'][-1]} in leaf {base // LEAF_BYTES}")
    parts = [_columns(extents, segments["length"], base)]
    if to:
        parts.append(bytearray(len(moved) * _MOVED_ROW.itemsize))
        runs = _ffi.from_buffer(np.ascontiguousarray(moved))
        _lib.zt_moved_columns(runs, len(moved), base, _ffi.from_buffer(parts[-1]))
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
    sizes = [n * _ROW_BYTES, count * 8, count, k * _MOVED_ROW.itemsize]
    columns = _decompressed(table[at + 8 * count :], sum(sizes))
    base = leaf * LEAF_BYTES
    extents, lengths = _rows_of(columns, n, count, base)
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


def _columns(extents: ex.Extents, lengths: npt.NDArray[np.uint64], base: int) -> bytearray:
    """The columns of extents and segments."""
    n, count = len(extents), len(lengths)
    out, sizes = bytearray(n * _ROW_BYTES + count * 9), np.ascontiguousarray(lengths)
    rows = _ffi.from_buffer(np.ascontiguousarray(extents))
    _check(
        _lib.zt_columns(rows, n, _ffi.from_buffer(_WORDS, sizes), count, base, _ffi.from_buffer(out)), extents, count
    )
    return out


def _rows_of(columns: bytes, n: int, count: int, base: int) -> tuple[ex.Extents, npt.NDArray[np.uint64]]:
    """The extents, and the lengths of the segments. `columns` has as many bytes as it takes, or more."""
    extents, lengths = np.empty(n, ex.EXTENT), np.empty(count, np.uint64)
    most = _ffi.new(_WORD)
    source, rows = _ffi.from_buffer(columns), _ffi.from_buffer(extents)
    result = _lib.zt_rows(source, n, count, base, rows, _ffi.from_buffer(_WORDS, lengths), most)
    if result == -errno.EINVAL:
        raise FormatError(f"has an extent of segment {most[0]}, of {count}")
    _check(result, extents, count)
    return extents, lengths


def put(extents: ex.Extents, count: int, start: int, stop: int, offset: int) -> tuple[ex.Extents, list[int]]:
    """One extent of a new segment over those of `count` segments.

    Returns the extents, whose segments are numbered by first appearance, and which segment each of these was, or
    `count` for the new one.
    """
    out, order, used = np.empty(len(extents) + 2, ex.EXTENT), np.empty(count + 1, np.uint32), _ffi.new(_SIZE)
    old = _ffi.from_buffer(np.ascontiguousarray(extents))
    new, numbers = _ffi.from_buffer(out), _ffi.from_buffer(_NUMBERS, order)
    n = _lib.zt_put(old, len(extents), count, start, stop, offset, new, numbers, used)
    _check(min(n, 0), extents, count)
    return out[:n], order[: used[0]].tolist()


def _check(result: int, extents: ex.Extents, count: int) -> None:
    if result == -errno.EINVAL:
        raise FormatError(f"has an extent of segment {extents['segment'].max()}, of {count}")
    if result:
        raise MemoryError


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


# -- what was moved: read by NumPy, for who reads it has time


def _rows(planes: bytes, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    count = len(planes) // dtype.itemsize
    turned = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, count).T)
    return turned.view(dtype).reshape(count)


def _unpack_places(places: npt.NDArray[np.void], rows: npt.NDArray[np.void], base: int) -> None:
    lengths = rows["length"].astype(np.uint64)
    stops = np.cumsum(rows["gap"] + lengths) + np.uint64(base)
    places["start"], places["stop"] = stops - lengths, stops
