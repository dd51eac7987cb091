"""The on-disk format, version 1: a promise. Whatever is stored is described here, byte by byte, and only here.

What this describes can be read for ever: `tests/golden` holds a database that every version must open, check, read
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
    ``(1, extents: bytes, segments: bytes, references: tuple, to: bytes, moved: bytes)``. 64 MiB of the file: which
    bytes of them are which bytes of which segment.

    ``extents``: rows of 28 bytes, ``start u8, stop u8, segment u4, offset u8``. Bytes [start, stop) of the file are
    bytes [offset, offset + stop - start) of the segment of this index. Positions are in the whole file, and inside of
    the leaf's 64 MiB; start < stop; rows are sorted and disjoint. Bytes in no extent are zeros.

    ``segments``: rows of 16 bytes, ``length u8, checksum u8``, one for each of ``references``, which are the
    segments. The checksum is the XXH3-64 (seed 0) of all ``length`` bytes. No extent ends beyond its segment's
    length.

    ``to`` is empty, or the oid (8 bytes) of the segment into which bytes were last joined. Then ``moved`` has rows of
    32 bytes, ``start u8, stop u8, oid 8 bytes, offset u8``, sorted and disjoint: bytes [start, stop) of the file were
    bytes from ``offset`` on of the segment of that oid before. Only merges of concurrent changes look at it: a move
    is no change.

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

__all__ = ["FANOUT", "LEAF_BYTES", "MAX_DEPTH", "VERSION", "broken", "name_of", "unpack_state"]

VERSION = 1
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


def unpack_state(obj: Any, state: Any, fields: int, *, optional: int = 0) -> tuple[Any, ...]:
    """The fields of a stored state after its version, or `FormatError` naming the object."""
    if not isinstance(state, tuple) or not state or type(state[0]) is not int:
        raise broken(obj, f"has a state of no known format: {type(state).__name__}")
    if state[0] > VERSION:
        raise broken(
            obj,
            f"was written by a newer dask_zbig, in format version {state[0]}; this one reads version {VERSION}: "
            f"upgrade it",
        )
    if state[0] != VERSION:
        raise broken(obj, f"is of format version {state[0]}, which never was")
    if not fields < len(state) <= fields + 1 + optional:
        raise broken(obj, f"has {len(state) - 1} fields where format {VERSION} has {fields}")
    return state[1:]
