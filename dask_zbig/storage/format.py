"""The on-disk format, a promise: version 1, and version 2 of the extent map's leaves. Whatever is stored is described
here, byte by byte, and only here.

What this describes can be read for ever: `tests/golden` holds databases that every version must open, check, read
and write. An object that breaks these rules is refused, by a `FormatError`, when it is loaded; `dask-zbig check` finds
all that arrays are made of and looks at every byte of it.

**Objects.** An array is a graph of ZODB objects, each with a record of its own. A record is ZODB's: two pickles, of
the class and of the state. The dotted paths of the classes below are part of the format. A state is a tuple whose
first field is the version, the int 1; a greater one was written by a newer dask_zbig, and is refused. References are
ZODB's persistent references (an oid of 8 bytes, and the class), so a pack keeps what an array has. Packed tables are
``bytes``; in them all numbers are unsigned, little-endian and not aligned: u2, u4, u8 take 2, 4, 8 bytes.

``dask_zbig.array.zbigarray.ZBigArray``, or a subclass of it
    ``(1, shape: tuple of int, dtype, order: "C" | "F", file: ZBigFile)``. ``dtype`` is NumPy's own description of a
    dtype as in an ``.npy`` file, ``numpy.lib.format.dtype_to_descr``; never one that has objects in it, or elements
    of no bytes, or axes. At most 64 axes; fewer than 2^63 bytes. Element (0, ..., 0) is at byte 0 of the file; the
    elements follow in the order given, without gaps. If users have given the object other attributes, a dict of these
    is one more field.

``dask_zbig.array.arrayref.ArrayRef`` (no object of its own, but part of the state of others)
    ``(1, array: ZBigArray, position: int, shape: tuple of int, strides: tuple of int, dtype)``: a view of the array,
    whose element (0, ..., 0) begins at byte ``position`` of its file; ``strides`` in bytes.

``dask_zbig.array.group.ArrayGroup``
    ``(1, attrs: dict, arrays: dict)``, where ``arrays`` has by name (str) ``(array: ZBigArray, dims: tuple of str,
    coordinate: bool, attrs: dict)``, in the order in which they were added. Attributes are by str: Python's and
    datetime's plain values, NumPy scalars and arrays, and lists, tuples and dicts of these.

``dask_zbig.storage.tree.ZBigFile``
    ``(1, depth: int, root: None | ExtentLeaf | ExtentNode, truncation: Truncation, journal: Journal)``. A file of
    2^63 bytes, zeros where nothing was written, mapped by a tree of fixed keys. ``depth`` is 0 to 4. With 0 the root
    is the one leaf, of bytes 0 .. 64 MiB, or None: nothing was ever written. Else it is a node of level ``depth``.

``dask_zbig.storage.tree.ExtentNode``
    ``(1, level: int, keys: bytes, children: tuple)``. ``level`` is 1 to 4. ``keys``: a u2 for each child, ascending,
    each below 1024. Children of a node of level 1 are leaves, of level n > 1 nodes of level n - 1. Child ``k`` covers
    ``64 MiB * 1024^(level-1)`` bytes, from ``k`` times that on, counted from where its node begins. A child that is
    missing is a hole.

``dask_zbig.storage.tree.ExtentLeaf``
    64 MiB of the file: which bytes of them are which bytes of which segment. Version 2, which is written; and version
    1, which is read. Both say the same: rows of extents, and a length and a checksum for each of ``references``, which
    are the segments.

    Of an extent there are ``start, stop, segment, offset``: bytes [start, stop) of the file are bytes [offset, offset
    + stop - start) of the segment of this index. Positions are in the whole file, and inside of the leaf's 64 MiB;
    start < stop; rows are sorted and disjoint. Bytes in no extent are zeros. The checksum of a segment is the XXH3-64
    (seed 0) of all its bytes. No extent ends beyond its segment's length.

    ``to`` is the oid of the segment into which bytes were last joined, if that is noted; then there are *moved* rows
    ``start, stop, oid, offset``, sorted and disjoint: bytes [start, stop) of the file were bytes from ``offset`` on of
    the segment of that oid before. Only merges of concurrent changes look at it: a move is no change.

    Version 2: ``(2, table: bytes, references: tuple)``. If there are no segments ``table`` is empty. Else it is, one
    after the other, for n extents, m segments and k moved rows:

    - ``leaf u8`` (which one of the file), ``n u4, k u4, age u1`` (commits of this leaf since the move);
    - ``to``, 8 bytes, if k is not 0;
    - the checksums: m times u8;
    - compressed by zlib, exactly ``20 n + 9 m + 24 k`` bytes: the columns of the extents, ``gap u4, length u4, code
      u4, residue u8``; ``length u8`` of the segments; ``follows u1`` of the segments; the columns of the moved rows,
      ``gap u4, length u4, oid u8, offset u8``. Of a column, and of all columns of a table together, there come the
      first bytes of all rows, the second bytes of all rows, and so on.

    ``gap`` is from the stop of the row before, or from where the leaf begins, to start. ``code`` is 0 for the segment
    whose number is that of the zeros before it, else the segment's number and 1. ``residue`` is offset less what was
    to be expected, modulo 2^64: 0 for the first extent of a segment; else, if the one before of the same segment is
    (start', stop', offset'), offset' + start - start' where ``follows`` of the segment is 0, and offset' + stop' -
    start' where it is 1. ``oid`` is the number that the oid is in big-endian order, less that of the row before.

    Version 1: ``(1, extents: bytes, segments: bytes, references: tuple, to: bytes, moved: bytes)``. ``extents``: rows
    of 28 bytes, ``start u8, stop u8, segment u4, offset u8``. ``segments``: rows of 16 bytes, ``length u8, checksum
    u8``. ``to`` is empty or 8 bytes; ``moved``: rows of 32 bytes, ``start u8, stop u8, oid 8 bytes, offset u8``.

Segments
    Immutable: written once, by the transaction that creates them, and never changed. Either a ``ZODB.blob.Blob``,
    whose file is ``length`` bytes long; or a ``dask_zbig.storage.segment.InlineSegment``, ``(1, data: bytes)``. The
    length is compared before a file is mapped; the checksum when bytes come from objects or over a network. Bits that
    change in a local file are found by a check only.

``dask_zbig.storage.tree.Truncation``
    ``(1, count: int)``. Changes whenever bytes are cut off. Every commit of data checks that it is current, so a
    write cannot be merged with a concurrent truncation.

``dask_zbig.storage.tree.Journal``
    ``(1, jobs: tuple of str)``. The ids of the cluster jobs published into this file, oldest first, at most 256.

``dask_zbig.cluster.staging``
    ``root["dask_zbig.staging"]`` is an ``OOBTree`` of jobs by id (str), present once a cluster has written to the
    database. ``StagingJob`` is ``(1, ended: bool, lease: Lease, slots: OOBTree)``: whether it was removed, and its
    slots by name. ``Lease`` is ``(1, seconds: float, until: float)``: for how long it is renewed at a time, and when
    (seconds since the epoch) the job becomes garbage; 0 when it was removed. ``StagingSlot`` is ``(1, entries:
    OOBTree)``: by attempt id, ``(segments: tuple, bytes: int)``; nothing else may refer to them yet.
"""

from __future__ import annotations

from typing import Any

from dask_zbig.errors import FormatError

__all__ = ["FANOUT", "LEAF_BYTES", "LEAF_VERSION", "MAX_DEPTH", "VERSION", "broken", "name_of", "unpack_state"]

VERSION = 1
#: Of an `ExtentLeaf`'s state. Version 1 of it is read, and becomes this one when the leaf is changed.
LEAF_VERSION = 2
LEAF_BYTES = 64 << 20
FANOUT = 1024
#: So deep is the map of a file of 2^63 bytes.
MAX_DEPTH = 4


def name_of(obj: Any) -> str:
    """A stored object's class and oid, for messages. Loads nothing."""
    oid = getattr(obj, "_p_oid", None)
    return type(obj).__name__ + (f" 0x{int.from_bytes(oid, 'big'):x}" if isinstance(oid, bytes) else "")


def broken(obj: Any, what: str) -> FormatError:
    """The error that says `what` is wrong with an object's state."""
    return FormatError(f"{name_of(obj)} {what}")


def unpack_state(obj: Any, state: Any, fields: int, *, optional: int = 0, version: int = VERSION) -> tuple[Any, ...]:
    """The fields of a stored state after its version, or `FormatError` naming the object."""
    if not isinstance(state, tuple) or not state or type(state[0]) is not int:
        raise broken(obj, f"has a state of no known format: {type(state).__name__}")
    if state[0] > version:
        raise broken(
            obj,
            f"was written by a newer dask_zbig, in format version {state[0]}; this one reads version {version}: "
            f"upgrade it",
        )
    if state[0] != version:
        raise broken(obj, f"is of format version {state[0]}, which never was")
    if not fields < len(state) <= fields + 1 + optional:
        raise broken(obj, f"has {len(state) - 1} fields where format {version} has {fields}")
    return state[1:]
