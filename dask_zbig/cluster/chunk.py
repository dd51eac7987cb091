"""The ndarray that Dask's tasks get: it crosses processes by reference.

A `Chunk` is a read-only ndarray over mapped segments. To a worker it is memory; on the wire and in a spill file
it is its address: which array, at which snapshot, which bytes. Any computation on it, any copy of it is a plain
ndarray.
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

from dask_zbig.array.indexing import bounds
from dask_zbig.cluster.worker import reading
from dask_zbig.database import Location
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
        self._origin = getattr(obj, "_origin", None)
        self._address = getattr(obj, "_address", 0)
        self._position = getattr(obj, "_position", 0)
        self._span = getattr(obj, "_span", 0)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        if out is not None:
            kwargs["out"] = tuple(_plain(o) for o in out)
        return getattr(ufunc, method)(*(_plain(i) for i in inputs), **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return func(*_plain(tuple(args)), **{k: _plain(v) for k, v in kwargs.items()})

    def reference(self) -> tuple[Any, ...] | None:
        """(origin, position, shape, strides, dtype) if this is a view of the mapping, else None."""
        if self._origin is None or self.flags.writeable:
            return None
        position = self._position + self.__array_interface__["data"][0] - self._address
        lo, hi = bounds(position, self.shape, self.strides, self.itemsize)
        if lo < self._position or hi > self._position + self._span:
            return None  # a copy
        return self._origin, position, self.shape, self.strides, np.lib.format.dtype_to_descr(self.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reference = self.reference()
        if reference is None:
            return _plain(self).__reduce_ex__(protocol)
        return open_chunk, reference

    def __copy__(self) -> npt.NDArray[Any]:
        return np.array(_plain(self))

    def __deepcopy__(self, memo: Any) -> npt.NDArray[Any]:
        return np.array(_plain(self))

    def copy(self, order: Any = "C") -> npt.NDArray[Any]:  # type: ignore[override]
        """A plain array."""
        return np.array(_plain(self), order=order)

    def astype(self, *args: Any, **kwargs: Any) -> npt.NDArray[Any]:  # type: ignore[override]
        """A plain array."""
        return _plain(self).astype(*args, **kwargs)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, Chunk):
        return value.view(np.ndarray)
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(v) for v in value) if any(_holds(v) for v in value) else value
    return value


def _holds(value: Any) -> bool:
    return isinstance(value, (Chunk, tuple, list))


def open_chunk(origin: Origin, position: int, shape: tuple[int, ...], strides: tuple[int, ...], descr: Any) -> Chunk:
    """Map the bytes that a reference means, all of them, now.

    Raises
    ------
    LoadError
        If they cannot be loaded. This is an ordinary call: the task fails, and Dask may try it again.
    """
    dtype = np.lib.format.descr_to_dtype(descr)
    lo, hi = bounds(position, shape, strides, dtype.itemsize)
    if lo == hi:
        view = np.empty(shape, dtype)
        view.flags.writeable = False
    else:
        with reading(origin.location, origin.tid) as connection:
            array = connection.get(origin.oid)
            opened = open_file(array._file, array, connection)
            opened.prefetch(lo, hi)
            view = opened.view(lo, hi, position, shape, dtype, strides)
    chunk = view.view(Chunk)
    chunk._origin = origin
    chunk._position = lo
    chunk._span = hi - lo
    chunk._address = view.__array_interface__["data"][0] - (position - lo)
    return chunk


# -- what Dask asks of a type


@sizeof.register(Chunk)
def _sizeof(chunk: Chunk) -> int:
    """Its pages belong to the page cache; the process holds next to nothing."""
    return 256 if chunk.reference() is not None else int(chunk.nbytes)


@dask_serialize.register(Chunk)
def _serialize(chunk: Chunk, context: Any = None) -> tuple[dict[str, Any], list[Any]]:
    reference = chunk.reference()
    if reference is not None:
        return {"zbig": pickle.dumps(reference)}, []
    plain: Callable[..., Any] = serialize_numpy_ndarray
    return plain(_plain(chunk), context)  # type: ignore[no-any-return]


@dask_deserialize.register(Chunk)
def _deserialize(header: dict[str, Any], frames: list[Any]) -> Any:
    if "zbig" in header:
        return open_chunk(*pickle.loads(header["zbig"]))
    return deserialize_numpy_ndarray(header, frames)
