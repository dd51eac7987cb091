"""Looking into stored objects without making them: nothing that is in the database gets to run, or need be importable.

A record becomes its class's name and its state, made of plain values. Of classes only those of the format itself are
real; every other one is a `Stub`, which takes whatever a pickle does to it and keeps it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from persistent import Persistent
from ZODB._compat import PersistentUnpickler
from ZODB.blob import Blob

from dask_zbig.errors import FormatError
from dask_zbig.storage.segment import InlineSegment
from dask_zbig.storage.tree import ExtentLeaf, ExtentNode, Journal, Truncation, ZBigFile

__all__ = ["CLASSES", "Reference", "children", "read_record", "reference_to"]

_REAL: dict[str, Any] = {
    f"{cls.__module__}.{cls.__name__}": cls
    for cls in (Blob, ExtentLeaf, ExtentNode, InlineSegment, Journal, Truncation, ZBigFile)
}
#: The dotted paths of the format's classes.
CLASSES = frozenset(_REAL)
_DATA = ("persistent.mapping.", "persistent.list.", "persistent.dict.")
_LONGEST = 80


@dataclass(frozen=True, slots=True)
class Reference:
    """A stored object, and the class that it had when it was referred to, or ""."""

    oid: bytes
    kind: str


class Stub:
    """An instance of some class."""

    content: list[Any]

    def __new__(cls, *args: Any, **options: Any) -> Stub:
        stub = super().__new__(cls)  # (which may be all that is called)
        stub.content = [*args, options]
        return stub

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.content.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.content.append({key: value})

    def append(self, value: Any) -> None:
        self.content.append(value)

    def extend(self, values: Any) -> None:
        self.content.extend(values)

    add = append


def read_record(oid: bytes, record: bytes) -> tuple[str, Any]:
    """A stored object's class, by its dotted path, and its state.

    References in the state are objects of the format's classes that have an oid and nothing else, or `Reference`.
    Weak ones, and those into other databases, are None.

    Raises
    ------
    FormatError
        If the record is junk.
    """
    names: dict[type, str] = {}

    def find(module: str, name: str) -> Any:
        path = f"{module}.{name}"
        cls = _REAL.get(path) or type(str(name), (Stub,), {})
        names[cls] = path
        return cls

    try:
        unpickler = PersistentUnpickler(find, lambda ref: _reference(ref, names), io.BytesIO(record))
        meta, state = unpickler.load(), unpickler.load()
    except Exception as e:
        raise FormatError(f"object {_hex(oid)} has a record that cannot be read: {type(e).__name__}: {e}") from e
    cls = meta[0] if isinstance(meta, tuple) and meta else meta
    if isinstance(cls, tuple) and len(cls) == 2:  # an old way to store it
        return f"{cls[0]}.{cls[1]}", state
    if not isinstance(cls, type) or cls not in names:
        raise FormatError(f"object {_hex(oid)} is of no class, but of {cls!r}")
    return names[cls], state


def _hex(oid: bytes) -> str:
    return f"0x{int.from_bytes(oid, 'big'):x}"


def _reference(reference: Any, names: dict[type, str]) -> Any:
    """What stands for a referenced object."""
    cls: Any = None
    if isinstance(reference, tuple):
        reference, cls = reference
    if not isinstance(reference, bytes):
        return None
    if len(reference) != 8:
        raise ValueError(f"{reference!r} is no oid")
    if cls in _REAL.values():
        ghost = cls.__new__(cls)
        ghost._p_oid = reference
        return ghost
    return Reference(reference, names.get(cls, "") if isinstance(cls, type) else "")


def children(kind: str, state: Any) -> Iterator[tuple[str, Reference]]:
    """The objects that another one refers to, each with the key that it has there, if that is known.

    Parameters
    ----------
    kind, state
        From `read_record`.
    """
    if kind.startswith("BTrees."):
        yield from _of_btree(kind.rpartition(".")[2], state)
    elif kind.startswith(_DATA) and isinstance(state, dict):
        yield from _within(state.get("data"), "")
    elif isinstance(state, tuple):
        for value in state:
            yield from _within(value, "")
    else:
        yield from _within(state, "")


def reference_to(ghost: Any) -> Reference:
    """The reference that an object of one of the format's classes stands for."""
    return Reference(ghost._p_oid, f"{type(ghost).__module__}.{type(ghost).__name__}")


def _of_btree(name: str, state: Any) -> Iterator[tuple[str, Reference]]:
    if not isinstance(state, tuple) or not state or not isinstance(state[0], tuple):
        yield from _within(state, "")  # a Length, say
        return
    first, rest = state[0], state[1:]
    name = name.removesuffix("Py")
    if name.endswith(("BTree", "TreeSet")):
        if not rest and len(first) == 1:  # its only bucket is in it
            yield from _of_btree("Bucket" if name.endswith("BTree") else "Set", first[0])
            return
        for value in first:
            yield from _within(value, "")
    elif name.endswith("Bucket"):
        for key, value in zip(first[::2], first[1::2], strict=False):
            yield from _within(key, "")
            yield from _within(value, _text(key))
    else:
        for key in first:
            yield from _within(key, "")
    for value in rest:  # the next, or first, bucket
        yield from _within(value, "")


def _within(value: Any, name: str) -> Iterator[tuple[str, Reference]]:
    """The references in a value, without recursion: a pickle may be as deep as it likes."""
    todo = [(value, name)]
    met: set[int] = set()
    while todo:
        value, name = todo.pop()
        if isinstance(value, Reference):
            yield name, value
            continue
        if isinstance(value, Persistent):
            yield name, reference_to(value)
            continue
        if isinstance(value, (dict, list, tuple, set, frozenset, Stub)):
            if id(value) in met:
                continue
            met.add(id(value))
        if isinstance(value, dict):
            todo += [(k, name) for k in value if not isinstance(k, str)]
            todo += [(v, _join(name, _text(k))) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(v, _join(name, str(i))) for i, v in enumerate(value)]
        elif isinstance(value, (set, frozenset)):
            todo += [(v, name) for v in value]
        elif isinstance(value, Stub):
            todo += [(v, name) for v in value.content]


def _text(key: Any) -> str:
    text = str(key) if isinstance(key, (str, int, float, bytes)) else f"<{type(key).__name__}>"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _join(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key
