"""The ndarray that Dask's tasks get: it crosses processes by reference.

A `Chunk` is a read-only ndarray over mapped segments. To a worker it is memory; on the wire and in a spill file
it is its address: which array, at which snapshot, which bytes. Any computation on it, any copy of it is a plain
ndarray.

Every chunk has a window of its own. Windows that chunks share would collect mappings and resident pages for as
long as there is always one chunk alive, and Dask's memory monitor takes resident pages for used memory.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from dask.sizeof import sizeof
from distributed.protocol import dask_deserialize, dask_serialize
from distributed.protocol.numpy import deserialize_numpy_ndarray, serialize_numpy_ndarray
from ZODB.POSException import POSKeyError

from dask_zbig.ahead import ALL, bring
from dask_zbig.array.indexing import bounds
from dask_zbig.cluster.memory import watch_memory
from dask_zbig.cluster.residency import keep_low, touched
from dask_zbig.cluster.worker import reading
from dask_zbig.database import Location
from dask_zbig.errors import SnapshotError
from dask_zbig.storage.segment import GoneError
from dask_zbig.transaction import open_file

__all__ = ["Chunk", "Origin", "open_chunk"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Which stored array's bytes, at which snapshot."""

    location: Location
    oid: bytes
    tid: bytes


class Chunk(np.ndarray):
    """See the module. Made by `open_chunk`; thread-safe as any read-only array."""

    _origin: Origin | None
    _address: int
    _position: int
    _span: int

    def __array_finalize__(self, obj: Any) -> None:
        self._origin = None
        if isinstance(obj, Chunk):
            self._follow(obj)

    def _follow(self, other: Chunk) -> None:
        """This array came out of `other`: if it is a view of the same memory, it is a reference as well."""
        if other._origin is not None and _memory(self) is _memory(other):
            self._origin = other._origin
            self._address = other._address
            self._position = other._position
            self._span = other._span

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        if out is not None:
            kwargs["out"] = _plain(tuple(out))
        result = getattr(ufunc, method)(*_plain(inputs), **kwargs)
        touched(sum(i.nbytes for i in inputs if isinstance(i, Chunk)))
        return result

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = func(*_plain(tuple(args)), **{k: _plain(v) for k, v in kwargs.items()})
        if type(result) in (tuple, list):
            return type(result)(self._wrapped(r) for r in result)
        return self._wrapped(result)

    def _wrapped(self, result: Any) -> Any:
        """What a function made of this chunk: transposing, say, makes another view of the mapping."""
        if type(result) is np.ndarray and _memory(result) is _memory(self):
            chunk = result.view(Chunk)
            chunk._follow(self)
            return chunk
        touched(self.nbytes)
        return result

    def __getitem__(self, index: Any) -> Any:
        return _settled(super().__getitem__(index))

    def reference(self) -> tuple[Any, ...] | None:
        """(origin, position, shape, strides, dtype) if this is a view of the mapping, else None."""
        if self._origin is None or self.flags.writeable:
            return None
        position = self._position + self.__array_interface__["data"][0] - self._address
        lo, hi = bounds(position, self.shape, self.strides, self.itemsize)
        if lo < self._position or hi > self._position + self._span:
            return None  # by tricks with strides it looks beyond what was loaded
        return self._origin, position, self.shape, self.strides, self.dtype

    def __reduce_ex__(self, protocol: Any) -> Any:
        reference = self.reference()
        if reference is None:
            return _plain(self).__reduce_ex__(protocol)
        return open_chunk, reference

    def __copy__(self) -> npt.NDArray[Any]:  # type: ignore[override]
        return np.array(_plain(self))

    def __deepcopy__(self, memo: Any) -> npt.NDArray[Any]:  # type: ignore[override]
        return np.array(_plain(self))

    def copy(self, order: Any = "C") -> npt.NDArray[Any]:  # type: ignore[override]
        """A plain array."""
        return np.array(_plain(self), order=order)

    def astype(self, *args: Any, **kwargs: Any) -> npt.NDArray[Any]:
        """A plain array."""
        return _plain(self).astype(*args, **kwargs)  # type: ignore[no-any-return]

    def flatten(self, order: Any = "C") -> npt.NDArray[Any]:
        """A plain array."""
        return _plain(self).flatten(order)  # type: ignore[no-any-return]

    def take(self, *args: Any, **kwargs: Any) -> Any:
        """A plain array."""
        return _plain(self).take(*args, **kwargs)

    def reshape(self, *args: Any, **kwargs: Any) -> Any:
        """A view that is a reference as well, where no copy is needed; else a plain array."""
        return _settled(super().reshape(*args, **kwargs))

    def ravel(self, order: Any = "C") -> Any:
        """As `reshape`."""
        return _settled(super().ravel(order))


def _memory(array: Any) -> Any:
    """What owns the memory that an array is a view of."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


def _settled(value: Any) -> Any:
    """A chunk that is none any more is a plain array."""
    return _plain(value) if isinstance(value, Chunk) and value._origin is None else value


def _plain(value: Any) -> Any:
    if isinstance(value, Chunk):
        return value.view(np.ndarray)
    if type(value) in (tuple, list) and any(_holds(v) for v in value):
        return type(value)(_plain(v) for v in value)
    return value


def _holds(value: Any) -> bool:
    return isinstance(value, (Chunk, tuple, list))


def open_chunk(
    origin: Origin, position: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]
) -> Chunk:
    """Map the bytes that a reference means, all of them, now.

    Raises
    ------
    LoadError
        If they cannot be loaded. This is an ordinary call: the task fails, and Dask may try it again.
    SnapshotError
        If the snapshot was packed away.
    """
    watch_memory()
    lo, hi = bounds(position, shape, strides, dtype.itemsize)
    if lo == hi:
        view = np.empty(shape, dtype)
        view.flags.writeable = False
    else:
        view = _map(origin, lo, hi, position, shape, strides, dtype)
    chunk = view.view(Chunk)
    chunk._origin = origin
    chunk._position = lo
    chunk._span = hi - lo
    chunk._address = view.__array_interface__["data"][0] - (position - lo)
    return chunk


def _map(
    origin: Origin,
    lo: int,
    hi: int,
    position: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
) -> npt.NDArray[Any]:
    with reading(origin.location, origin.tid, hi - lo) as connection:
        try:
            array = connection.get(origin.oid)
            opened = open_file(array._file, array, connection)
            opened.enter()
            window = opened.space.window(lo, hi - lo)
            bring(opened, window, lo, hi, ALL)
            keep_low(window)
        except (POSKeyError, GoneError) as e:
            raise SnapshotError(
                f"{origin.location.alias} does not have the array 0x{origin.oid.hex().lstrip('0')} as of "
                f"transaction 0x{origin.tid.hex()} any more: that was packed away"
            ) from e
        return window.view(position, shape, dtype, strides, False)


# -- what Dask asks of a type


def _sizeof(chunk: Chunk) -> int:
    """Its pages belong to the page cache; the process holds next to nothing."""
    return 256 if chunk.reference() is not None else int(chunk.nbytes)


def _serialize(chunk: Chunk, context: Any = None) -> tuple[dict[str, Any], list[Any]]:
    reference = chunk.reference()
    if reference is not None:
        return {"zbig": pickle.dumps(reference)}, []
    plain: Callable[..., Any] = serialize_numpy_ndarray
    return plain(_plain(chunk), context)  # type: ignore[no-any-return]


def _deserialize(header: dict[str, Any], frames: list[Any]) -> Any:
    if "zbig" in header:
        return open_chunk(*pickle.loads(header["zbig"]))
    return deserialize_numpy_ndarray(header, frames)


sizeof.register(Chunk, _sizeof)
dask_serialize.register(Chunk, _serialize)
dask_deserialize.register(Chunk, _deserialize)
