"""The state of an extent leaf: how it is stored, and how three of them are merged.

Joining small segments (`storage.compaction`) moves bytes to another segment without changing them. For a merge
that must be no change, or a writer would conflict with whoever tidies up. So the leaf notes, of its last such
move, where each byte was before; a merge looks at the bytes where they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from persistent import Persistent

from dask_zbig.errors import FormatError
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import LEAF_BYTES, LEAF_VERSION, VERSION, name_of, unpack_state
from dask_zbig.storage.packing import MOVED, SEGMENT, pack, unpack
from dask_zbig.storage.segment import SegmentRef

__all__ = ["KEEP_MOVE", "MOVED", "NOTHING", "NOT_MOVED", "LeafState", "Move", "merge_leaves"]

#: For so many commits of its leaf a move is noted. Who began before them conflicts, if it wrote over what was joined.
KEEP_MOVE = 8


@dataclass(frozen=True, slots=True)
class Move:
    """The last joining of segments: into the segment of oid `to` ("" if there is none), and from where.

    `age`: how many commits have changed the leaf since.
    """

    to: bytes
    rows: npt.NDArray[np.void]
    age: int = 0

    def older(self) -> Move:
        """What is noted of it by the next commit."""
        return replace(self, age=self.age + 1) if self.to and self.age < KEEP_MOVE else NOT_MOVED


NOT_MOVED = Move(b"", np.empty(0, MOVED))


@dataclass(frozen=True, slots=True)
class LeafState:
    """What a leaf holds. The references are segments, or ZODB's placeholders for them in a merge."""

    extents: ex.Extents
    refs: tuple[SegmentRef, ...]
    move: Move = NOT_MOVED

    def pack(self) -> tuple[Any, ...]:
        """As it is stored."""
        segments = np.array([(r.length, r.checksum) for r in self.refs], SEGMENT)
        table = pack(self.extents, segments, self.move.to, self.move.rows, self.move.age)
        return (LEAF_VERSION, table, tuple(r.obj for r in self.refs))

    @classmethod
    def unpack(cls, leaf: Any, state: Any) -> LeafState:
        """From what was stored for `leaf`. Raises `FormatError` if that breaks the format's rules."""
        rows = isinstance(state, tuple) and bool(state) and type(state[0]) is int and state[0] == VERSION
        fields = unpack_state(leaf, state, 5) if rows else unpack_state(leaf, state, 2, version=LEAF_VERSION)
        try:
            extents, segments, move, objects = _of_rows(*fields) if rows else _of_table(*fields)
            moved = move.rows
            if len(moved) and (
                np.any(moved["start"] >= moved["stop"]) or np.any(moved["start"][1:] < moved["stop"][:-1])
            ):
                raise FormatError("notes a move of bytes that are not sorted and disjoint")
            lo = int(extents["start"][0]) // LEAF_BYTES * LEAF_BYTES if len(extents) else 0
            ex.validate(extents, segments["length"].tolist(), lo, lo + LEAF_BYTES)
        except FormatError as e:
            raise FormatError(f"{name_of(leaf)}: {e}") from None
        refs = tuple(
            SegmentRef(obj, length, checksum)
            for obj, (length, checksum) in zip(objects, segments.tolist(), strict=True)
        )
        return cls(extents, refs, move)

    def keys(self) -> list[Any]:
        """The identities of the segments."""
        return [_identity(r.obj) for r in self.refs]

    def before_move(self) -> tuple[ex.Extents, list[Any]]:
        """The extents and their segments' identities as they would be if nothing had been joined."""
        keys = self.keys()
        joined = (self.move.to, None)
        if not self.move.to or joined not in keys:
            return self.extents, keys
        rows = self.move.rows
        origins = {oid: len(keys) + i for i, oid in enumerate(sorted(set(rows["oid"].tolist())))}
        was = np.zeros(len(rows), ex.EXTENT)
        for name in ("start", "stop", "offset"):
            was[name] = rows[name]
        was["segment"] = [origins[oid] for oid in rows["oid"].tolist()]
        # What was written since lies in other segments; what was not moved there was a hole, filled to bridge it.
        in_joined = self.extents["segment"] == keys.index(joined)
        still = ex.restrict(was, ex.covered(self.extents[in_joined]))
        return (
            ex.splice(self.extents[~in_joined], still),
            keys + [(oid.ljust(8, b"\0"), None) for oid in origins],  # NumPy drops trailing zeros
        )


#: What an empty leaf is stored as.
NOTHING = (LEAF_VERSION, b"", ())

_Tables: TypeAlias = "tuple[ex.Extents, npt.NDArray[np.void], Move, tuple[Any, ...]]"


def _of_table(table: Any, objects: Any) -> _Tables:
    """Extents, segments, the move and the segments' objects, as version 2 has them."""
    if not isinstance(table, bytes) or not isinstance(objects, tuple):
        raise FormatError("has fields of wrong types")
    extents, segments, to, moved, age = unpack(table, len(objects))
    return extents, segments, Move(to, moved, age) if to else NOT_MOVED, objects


def _of_rows(packed: Any, table: Any, objects: Any, to: Any, moved: Any) -> _Tables:
    """The same, as version 1 has them."""
    if not all(isinstance(b, bytes) for b in (packed, table, to, moved)) or not isinstance(objects, tuple):
        raise FormatError("has fields of wrong types")
    if len(packed) % ex.EXTENT.itemsize or len(table) != len(objects) * SEGMENT.itemsize:
        raise FormatError(f"has tables of {len(packed)} and {len(table)} bytes")
    if len(to) not in (0, 8) or len(moved) % MOVED.itemsize:
        raise FormatError(f"notes a move to {to!r} in {len(moved)} bytes")
    move = Move(to, np.frombuffer(moved, MOVED)) if to else NOT_MOVED
    return np.frombuffer(packed, ex.EXTENT), np.frombuffer(table, SEGMENT), move, objects


def _identity(obj: Any) -> tuple[Any, Any]:
    """Of a segment, or of the placeholder for one. Loads nothing."""
    if isinstance(obj, Persistent):
        return (obj._p_oid, None)
    return (obj.oid, getattr(obj, "database_name", None))


def merge_leaves(old: LeafState, committed: LeafState, new: LeafState) -> LeafState:
    """What both changed `old` to.

    Raises
    ------
    Overlap
        If they changed the same bytes.
    """
    was, theirs, ours = (side.before_move() for side in (old, committed, new))
    changed = ex.changed(*was, *theirs, *ours)
    extents, table = ex.combine(committed.extents, committed.keys(), new.extents, new.keys(), changed)
    sides: dict[str, Sequence[SegmentRef]] = {"committed": committed.refs, "new": new.refs}
    refs = tuple(sides[side][i] for side, i in table)
    return LeafState(extents, refs, committed.move if any(r.key == committed.move.to for r in refs) else NOT_MOVED)
