"""What the columns of a leaf's table are, in plain Python: the model that csrc/table.c is held against."""

from __future__ import annotations

import struct

from dask_zbig.errors import FormatError

ROW = struct.Struct("<IIIQ")
WORD = (1 << 64) - 1


def _expected(before, start, behind):
    """Where the next extent of a segment, from `start` on, is expected in it."""
    a, b, offset = before
    return offset + (b - a if behind else start - a) & WORD


def _turned(rows, width):
    return b"".join(rows[k::width] for k in range(width))


def columns(rows, lengths, base):
    """Of extents, as a list of tuples, and of the lengths of segments."""
    votes = [0] * len(lengths)
    last = {}
    for start, stop, segment, offset in rows:
        if segment in last:
            votes[segment] += offset == _expected(last[segment], start, True)
            votes[segment] -= offset == _expected(last[segment], start, False)
        last[segment] = start, stop, offset
    in_order = list(last) == list(range(len(last)))
    packed, last, at = b"", {}, base
    for start, stop, segment, offset in rows:
        first = segment not in last
        step = 0 if first else _expected(last[segment], start, votes[segment] > 0)
        code = 0 if first and in_order else segment + 1
        packed += ROW.pack(start - at, stop - start, code, (offset - step) & WORD)
        last[segment] = start, stop, offset
        at = stop
    sizes = b"".join(length.to_bytes(8, "little") for length in lengths)
    return _turned(packed, ROW.size) + _turned(sizes, 8) + bytes(vote > 0 for vote in votes)


def rows(data, n, count, base):
    """The inverse: (extents, lengths)."""
    table, sizes = data[: n * ROW.size], data[n * ROW.size :][: 8 * count]
    behind = data[n * ROW.size + 8 * count :]
    found, last, at, met = [], {}, base, 0
    coded = [ROW.unpack(table[i::n]) for i in range(n)]
    segments = []
    for _, _, code, _ in coded:
        segments.append(code - 1 if code else met)
        met += not code
    if n and max(segments) >= count:
        raise FormatError(f"has an extent of segment {max(segments)}, of {count}")
    for (gap, length, _, residue), segment in zip(coded, segments, strict=True):
        start, stop = at + gap, at + gap + length
        step = _expected(last[segment], start, behind[segment]) if segment in last else 0
        last[segment] = start, stop, (residue + step) & WORD
        found.append((start, stop, segment, (residue + step) & WORD))
        at = stop
    return found, [int.from_bytes(sizes[i::count], "little") for i in range(count)]


def put(rows, count, start, stop, offset):
    """One extent of a new segment, number `count`, over others: (extents by first appearance, what these were)."""
    left = [(a, min(b, start), s, o) for a, b, s, o in rows if a < start]
    right = [(max(a, stop), b, s, o + max(a, stop) - a) for a, b, s, o in rows if b > stop]
    spliced = [*left, (start, stop, count, offset), *right]
    order = list(dict.fromkeys(s for _, _, s, _ in spliced))
    return [(a, b, order.index(s), o) for a, b, s, o in spliced], order
