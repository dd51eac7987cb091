"""The on-disk format, version 1. Whatever is stored is described here, and only here.

An array is a graph of ZODB objects. The dotted paths of their classes are part of the format; so are their
states, which are tuples that begin with the format's version. All integers are little-endian.

``dask_zbig.array.zbigarray.ZBigArray``
    ``(1, shape: tuple of int, dtype, order: "C" | "F", file: ZBigFile)``. ``dtype`` is NumPy's own
    description of a dtype as in an ``.npy`` file: ``numpy.lib.format.dtype_to_descr``. Element (0, ..., 0)
    is at byte 0 of the file; the elements follow in the order given, without gaps. If users have given the object
    other attributes, a dict of these is the last field.

``dask_zbig.storage.tree.ZBigFile``
    ``(1, depth: int, root: ExtentLeaf | ExtentNode | None, truncation: Truncation, journal: Journal)``. A file
    of 2^63 bytes, zeros where nothing was written. With ``depth`` 0 the root is the one leaf, of bytes 0 .. 64 MiB;
    else it is a node of level ``depth``. ``None``: nothing was ever written.

``dask_zbig.storage.tree.Truncation``
    ``(1, count: int)``. Changes whenever bytes are cut off. Every commit of data checks that it is current,
    so a write cannot be merged with a concurrent truncation.

``dask_zbig.storage.tree.Journal``
    ``(1, jobs: tuple of str)``. The ids of the cluster jobs published into this file, oldest first, at most 256.

``dask_zbig.storage.tree.ExtentNode``
    ``(1, level: int, keys: bytes, children: tuple)``. ``keys`` are the children's indices as u2, ascending,
    each below 1024. A child of a node of level 1 is a leaf, of a higher level a node of the level below. Child
    ``k`` of a node of level ``n`` covers ``64 MiB * 1024^(n-1)`` bytes.

``dask_zbig.storage.tree.ExtentLeaf``
    ``(1, extents: bytes, segments: bytes, references: tuple, to: bytes, moved: bytes)``. 64 MiB of the file.
    ``extents`` is an array of ``(start u8, stop u8, segment u4, offset u8)``, packed, sorted, disjoint, of
    positions in the whole file; bytes in no extent are zeros. ``segments`` is an array of
    ``(length u8, checksum u8)``, one for each of ``references``, which are the segments themselves. The checksum
    is the XXH3-64 of the ``length`` bytes.
    ``to`` is empty, or the oid of the segment into which bytes were last joined; then ``moved`` is an array of
    ``(start u8, stop u8, oid 8 bytes, offset u8)``: bytes that went there from the segment of that oid.

Segments
    Immutable: written once, by the transaction that creates them, and never changed. Either a
    ``ZODB.blob.Blob``, or a ``dask_zbig.storage.segment.InlineSegment`` with state ``(1, data: bytes)``.

``dask_zbig.cluster.staging``
    ``root["dask_zbig.staging"]`` is an ``OOBTree`` of jobs by id (str), present once a cluster has written to the
    database. ``StagingJob`` is ``(1, ended: bool, lease: Lease, slots: OOBTree)``: whether it was removed, and its
    slots by name. ``Lease`` is ``(1, seconds: float, until: float)``: for how long it is renewed at a time, and
    when (seconds since the epoch) the job becomes garbage; 0 when it was removed. ``StagingSlot`` is
    ``(1, entries: OOBTree)``: by attempt id, ``(segments: tuple, bytes: int)``; nothing else may refer to them yet.
"""

from __future__ import annotations

from typing import Any

from dask_zbig.errors import FormatError

__all__ = ["FANOUT", "LEAF_BYTES", "VERSION", "unpack_state"]

VERSION = 1
LEAF_BYTES = 64 << 20
FANOUT = 1024


def unpack_state(obj: object, state: Any, fields: int, *, optional: int = 0) -> tuple[Any, ...]:
    """The fields of a stored state after its version, or `FormatError` naming the object."""
    name = f"{type(obj).__name__} {getattr(obj, '_p_oid', None)!r}"
    if not isinstance(state, tuple) or not state or not isinstance(state[0], int):
        raise FormatError(f"{name} has a state of no known format: {type(state).__name__}")
    if state[0] != VERSION:
        raise FormatError(
            f"{name} was stored in format version {state[0]}, but this dask_zbig reads version {VERSION} only; "
            f"use a newer dask_zbig"
        )
    if not fields < len(state) <= fields + 1 + optional:
        raise FormatError(f"{name} has {len(state) - 1} fields where format {VERSION} has {fields}")
    return state[1:]
