"""Segments: immutable runs of bytes, in a ZODB Blob or in an object; and what an extent map knows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import xxhash
from persistent import Persistent

from dask_zbig.errors import LoadError
from dask_zbig.storage.format import VERSION, broken, unpack_state

__all__ = ["GoneError", "Identity", "InlineSegment", "SegmentRef", "checksum", "oid_of"]


class GoneError(LoadError):
    """The database has no record of a segment: it was packed away, if it was ever committed."""


class InlineSegment(Persistent):  # type: ignore[misc]
    """A small segment: its bytes are in the object. Immutable."""

    data: bytes

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __getstate__(self) -> tuple[int, bytes]:
        return (VERSION, self.data)

    def __setstate__(self, state: Any) -> None:
        (data,) = unpack_state(self, state, 1)
        if not isinstance(data, bytes):
            raise broken(self, f"holds a {type(data).__name__} where bytes belong")
        self.data = data


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """What an extent map knows of a segment: the object (often a ghost), its length and its checksum."""

    obj: Any
    length: int
    checksum: int

    @property
    def key(self) -> Any:
        """What tells segments apart: the oid, or the object itself before it has one."""
        oid = oid_of(self)
        return oid if oid is not None else id(self.obj)

    @property
    def inline(self) -> bool:
        """Whether the bytes lie in an object."""
        return isinstance(self.obj, InlineSegment)


#: A segment's oid, length and checksum. An oid is not enough: once its object was packed away, and the server was
#: restarted, some storages give it to another one.
Identity: TypeAlias = tuple[bytes, int, int]


def oid_of(ref: SegmentRef) -> bytes | None:
    """None before it is stored."""
    oid: bytes | None = ref.obj._p_oid if isinstance(ref.obj, Persistent) else ref.obj.oid
    return oid


def checksum(data: Any) -> int:
    """The format's checksum of bytes-like `data`."""
    return int(xxhash.xxh3_64_intdigest(data))
