"""A stored group as an xarray dataset that reads one snapshot: lazily, in any process, in Dask's chunks if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing
from ZODB.POSException import POSKeyError

from dask_zbig.array.group import ArrayGroup
from dask_zbig.cluster.chunk import Origin
from dask_zbig.cluster.snapshot import ArraySource
from dask_zbig.cluster.source import _chunks, dask_array
from dask_zbig.cluster.worker import reading
from dask_zbig.database import Location
from dask_zbig.errors import NotStoredError, SnapshotError

__all__ = ["dataset_at", "dataset_of", "find_group", "variables_of"]


class SnapshotArray(BackendArray):  # type: ignore[misc]
    """What xarray reads from: an `ArraySource`, indexed as xarray does. Small, picklable."""

    __slots__ = ("dtype", "shape", "source")

    def __init__(self, source: ArraySource) -> None:
        self.source = source
        self.shape = source.shape
        self.dtype = source.dtype

    def __getitem__(self, key: Any) -> Any:
        support = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        """By an outer index: of several arrays each picks along its axis."""
        arrays = [i for i, part in enumerate(key) if isinstance(part, np.ndarray)]
        for axis in arrays[1:]:  # NumPy would pair them
            plain = tuple(slice(None) if i == axis else part for i, part in enumerate(key))
            dropped = sum(isinstance(part, (int, np.integer)) for part in key[:axis])
            return np.take(self._read(plain), key[axis], axis=axis - dropped)
        return np.asarray(self.source[key])

    def __dask_tokenize__(self) -> Any:
        return self.source.__dask_tokenize__()


class SnapshotVariable(xr.Variable):  # type: ignore[misc]
    """A variable whose chunks are those of `from_zbigarray`.

    xarray's own are called by the URI and nothing else, so that what was computed from an older snapshot would be
    taken for the same; nor do they cross workers by reference.
    """

    __slots__ = ()

    def chunk(self, chunks: Any = {}, *args: Any, **kwargs: Any) -> Any:  # noqa: B006 - xarray's signature
        """As of `xarray.Variable`."""
        chunked = super().chunk(chunks, *args, **kwargs)
        source = _whole(self._data)
        if source is None or not isinstance(chunked.data, da.Array):
            return chunked
        return chunked._replace(data=dask_array(source, chunked.chunks, None))


def _whole(data: Any) -> ArraySource | None:
    """The array that is all of a variable's data, below whatever xarray has wrapped it in."""
    while not isinstance(data, SnapshotArray):
        if isinstance(data, indexing.LazilyIndexedArray):
            whole = all(
                isinstance(part, slice) and part.indices(n) == (0, n, 1)
                for part, n in zip(data.key.tuple, data.array.shape, strict=True)
            )
            if not whole:
                return None
        elif not isinstance(data, (indexing.CopyOnWriteArray, indexing.MemoryCachedArray)):
            return None
        data = data.array
    return data.source


def variables_of(group: ArrayGroup, arrays: Mapping[str, Any], kind: type[xr.Variable]) -> xr.Dataset:
    """A dataset of data by name, with a group's dimensions and attributes, without indexes that it cannot have."""
    variables = {name: kind(group.dims(name), data, group.attrs(name)) for name, data in arrays.items()}
    coords = {name: v for name, v in variables.items() if group.is_coordinate(name) or v.dims == (name,)}
    others = {name: v for name, v in variables.items() if name not in coords}
    return xr.Dataset(others, coords=coords, attrs=group.attrs())


def dataset_of(group: ArrayGroup, location: Location, tid: bytes) -> xr.Dataset:
    """The group of a connection at a snapshot, for other connections to read at that snapshot."""
    arrays = {}
    for name, array in group.items():
        source = ArraySource(Origin(location, array._p_oid, tid), array.shape, array.dtype, array.order)
        arrays[name] = indexing.LazilyIndexedArray(SnapshotArray(source))
    ds = variables_of(group, arrays, SnapshotVariable)
    for name, data in arrays.items():
        grid = _chunks(data.array.source, "auto")
        cut = {dim: sizes[0] for dim, sizes in zip(group.dims(name), grid, strict=True) if len(sizes) > 1}
        ds[name].encoding["preferred_chunks"] = cut  # (xarray warns of other lengths, so none where there is no need)
    return ds


def dataset_at(location: Location, oid: bytes, tid: bytes) -> xr.Dataset:
    """The group of an id, as of a transaction."""
    with reading(location, tid, 0) as connection:
        try:
            group = connection.get(oid)
            return dataset_of(group, location, tid)
        except POSKeyError as e:
            raise SnapshotError(f"{location.alias} has no such dataset as of transaction 0x{tid.hex()}") from e


def find_group(connection: Any, path: str) -> ArrayGroup:
    """The group at a path: keys from the root on, separated by "/"."""
    found: Any = connection.root()
    done: list[str] = []
    for key in path.strip("/").split("/"):
        try:
            found = found[key]
        except (KeyError, TypeError, IndexError):
            names = [repr(k) for k, v in found.items() if isinstance(v, ArrayGroup)] if hasattr(found, "items") else []
            place = f"at {'/'.join(done)!r}" if done else "in the root"
            raise NotStoredError(f"there is no {key!r} {place}; datasets there: {', '.join(names) or 'none'}") from None
        done.append(key)
    if not isinstance(found, ArrayGroup):
        raise NotStoredError(f"{path!r} is no dataset, but a {type(found).__name__}")
    return found
