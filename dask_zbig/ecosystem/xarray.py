"""xarray: datasets stored as an `ArrayGroup`, and read from one."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_zbig.array.group import ArrayGroup, checked_attrs
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.coordinator import store_together
from dask_zbig.cluster.source import Moment, from_zbigarray, tid_at
from dask_zbig.database import location
from dask_zbig.errors import DTypeError, NotStoredError, ShapeError

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["from_xarray", "to_xarray"]

#: What is neither in memory nor Dask's is copied in pieces of so many bytes.
PIECE = 64 << 20


def _need_xarray() -> Any:
    try:
        return importlib.import_module("xarray")
    except ImportError as e:
        raise ImportError("this needs xarray: pip install 'dask_zbig[xarray]'", name="xarray") from e


def to_xarray(group: ArrayGroup, chunks: Any = None, *, at: Moment | None = None) -> xr.Dataset:
    """A stored group of arrays as an `xarray.Dataset`.

    Parameters
    ----------
    group : ArrayGroup
    chunks : None, "auto" or dict, optional
        None: the variables are views of the arrays: nothing is copied, and what is written into them changes the
        arrays, in this transaction. Else they are Dask arrays, which read the snapshot that the connection sees now
        (see `from_zbigarray`): cut as that does, or as the lengths by dimension say (a dimension that is not named
        is not cut; ``{}`` is "auto").
    at : optional
        Read what was committed up to then, as in `from_zbigarray`. The variables are read-only then, and load what
        is asked for.

    Returns
    -------
    xarray.Dataset
        Coordinates that index a dimension are copied into memory, as xarray always does.

    Raises
    ------
    NotStoredError, UncommittedChangesError, SnapshotError
        As of `from_zbigarray`, with `chunks` or `at`.

    Examples
    --------
    >>> import dask_zbig as dz, numpy as np, transaction, xarray as xr, ZODB
    >>> db = ZODB.DB(None); conn = db.open()
    >>> ds = xr.Dataset({"wind": (("time", "station"), np.ones((3, 2)))}, {"time": [10, 20, 30]}, {"title": "test"})
    >>> group = dz.from_xarray(ds, conn.root(), "weather")
    >>> transaction.commit()
    >>> dz.to_xarray(group).identical(ds)
    True
    >>> dz.to_xarray(group)["wind"].loc[20] = 5  # a view: this writes
    >>> float(group["wind"][1, 0])
    5.0
    >>> transaction.commit()
    >>> float(dz.to_xarray(group, chunks={"time": 1})["wind"].sum().compute(scheduler="threads"))
    14.0
    >>> conn.close(); db.close()
    """
    xr = _need_xarray()
    from dask_zbig.ecosystem.snapshot import dataset_at, variables_of

    if not isinstance(group, ArrayGroup):
        raise TypeError(f"expected an ArrayGroup, not {type(group).__name__}")
    if at is not None:
        if group._p_jar is None or group._p_oid is None:
            raise NotStoredError(f"{group!r} was never committed, so it has no past")
        db = group._p_jar.db()
        ds = dataset_at(location(db), group._p_oid, tid_at(at, db))
        return ds if chunks is None else ds.chunk(_by_dim(chunks))
    arrays = {name: _data(array, group.dims(name), name, chunks) for name, array in group.items()}
    return variables_of(group, arrays, xr.Variable)


def _data(array: ZBigArray, dims: tuple[str, ...], name: str, chunks: Any) -> Any:
    view = array[...]
    if dims == (name,):
        return np.array(view)  # for an index
    if chunks is None or not dims:
        return view
    by_dim = _by_dim(chunks)
    if isinstance(by_dim, Mapping) and by_dim:
        return from_zbigarray(array, tuple(by_dim.get(dim, -1) for dim in dims))
    return from_zbigarray(array, by_dim or "auto")


def _by_dim(chunks: Any) -> Any:
    if not (isinstance(chunks, Mapping) or chunks == "auto"):
        raise TypeError(f"chunks must be None, 'auto' or lengths by dimension, not {chunks!r}")
    return chunks


def from_xarray(ds: xr.Dataset | xr.DataArray, parent: Any, name: str, *, append_dim: str | None = None) -> ArrayGroup:
    """Store a dataset, ``parent[name] = ds``, as part of the current transaction.

    Variables on Dask are computed, all in one graph, and written by the workers: returns when that is done.
    ``transaction.commit()`` then saves everything at once, or ``transaction.abort()`` nothing. dtypes are kept as
    they are, dates too; text becomes NumPy's, of fixed length. Encodings are not kept.

    Parameters
    ----------
    ds : xarray.Dataset or named xarray.DataArray
    parent : mapping
        Where to put it: a connection's root, a PersistentMapping or BTree. What is there by that name is replaced.
        With variables on Dask it must be stored in a database.
    name : str
    append_dim : str, optional
        Append instead, along this dimension, to the group that is there. It must be the first dimension of every
        variable that has it; of the others nothing is written.

    Returns
    -------
    ArrayGroup

    Raises
    ------
    DTypeError
        For what cannot be stored: objects, text with missing values, attributes that are no plain values, or values
        that do not fit what is appended to. Nothing was written.
    ShapeError
        If `ds` does not fit the group that it is appended to. Nothing was written.
    NotStoredError
        If there is nothing to append to, or if `parent` belongs to no database, but `ds` is on Dask.

    Examples
    --------
    >>> import dask_zbig as dz, numpy as np, xarray as xr
    >>> root = {}
    >>> day = xr.Dataset({"rain": ("time", [1.5])}, {"time": np.array(["2026-01-01"], "M8[s]")})
    >>> group = dz.from_xarray(day, root, "weather")
    >>> group = dz.from_xarray(day.assign_coords(time=day.time + np.timedelta64(1, "D")), root, "weather",
    ...                        append_dim="time")
    >>> group.sizes(), group["rain"].tolist()
    ({'time': 2}, [1.5, 1.5])
    """
    xr = _need_xarray()
    if isinstance(ds, xr.DataArray):
        if ds.name is None:
            raise DTypeError("a DataArray needs a name to be stored: ds.rename('x')")
        ds = ds.to_dataset(promote_attrs=False)
    if not isinstance(ds, xr.Dataset):
        raise TypeError(f"expected an xarray.Dataset, not {type(ds).__name__}")
    connection = getattr(parent, "_p_jar", None)
    if connection is None and any(_on_dask(v) for v in ds.variables.values()):
        raise NotStoredError("workers write into a database, and the mapping to put the dataset into is in none yet")
    if append_dim is not None:
        return _append(ds, parent, name, append_dim, connection)
    group = ArrayGroup(checked_attrs(ds.attrs, "the dataset"))
    stores = []
    for key, (values, attrs) in _checked(ds, ds.variables).items():
        array = ZBigArray(values.shape, values.dtype)
        group.add(key, array, ds.variables[key].dims, attrs, coordinate=key in ds.coords)
        if connection is not None:
            connection.add(array)
        stores.append((values, array))
    _write(stores, connection, append=False)
    parent[name] = group
    return group


def _append(ds: xr.Dataset, parent: Any, name: str, dim: str, connection: Any) -> ArrayGroup:
    group = parent.get(name)
    if not isinstance(group, ArrayGroup):
        raise NotStoredError(f"there is no dataset {name!r} to append to")
    growing = [key for key in group if dim in group.dims(key)]
    lacking = [key for key in growing if key not in ds.variables]
    if not growing or lacking:
        raise ShapeError(f"{lacking or group!r} to append to {group!r}" if lacking else f"{group!r} has no {dim!r}")
    unknown = [key for key, v in ds.variables.items() if dim in v.dims and key not in growing]
    if unknown:
        raise ShapeError(f"{unknown} are not in {group!r}")
    stores = []
    for key, (values, _) in _checked(ds, growing).items():
        array = group[key]
        _check_fit(values, array, key, ds.variables[key].dims, group.dims(key), dim)
        stores.append((values, array))
    _write(stores, connection, append=True)
    return group


def _check_fit(
    values: Any, array: ZBigArray, key: str, dims: tuple[Any, ...], stored: tuple[str, ...], dim: str
) -> None:
    if dims != stored or stored[0] != dim:
        raise ShapeError(
            f"{key!r} has dimensions {dims}, and is stored with {stored}: they must be the same and begin with {dim!r}"
        )
    if values.shape[1:] != array.shape[1:]:
        raise ShapeError(f"{key!r} of shape {values.shape} cannot be appended to {array!r}")
    text = array.dtype.kind in "US"
    if not np.can_cast(values.dtype, array.dtype, "safe" if text else "same_kind"):
        raise DTypeError(f"{key!r} has {values.dtype} values, which do not fit {array!r}")


def _checked(ds: xr.Dataset, names: Iterable[Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """By name: an ndarray, a Dask array, or a `_Slow` one, and attributes. Raises `DTypeError`."""
    found = {}
    for key in names:
        variable = ds.variables[key]
        if not isinstance(key, str) or not all(isinstance(dim, str) for dim in variable.dims):
            raise DTypeError(f"names of variables and dimensions must be str to be stored; there is {key!r}")
        if key in ds.indexes and ds.indexes[key].nlevels > 1:
            raise DTypeError(f"{key!r} belongs to a MultiIndex, which is not stored: use ds.reset_index first")
        found[key] = _values(variable, key), checked_attrs(variable.attrs, repr(key))
    return found


def _on_dask(variable: xr.Variable) -> bool:
    return variable.chunks is not None


def _values(variable: xr.Variable, key: str) -> Any:
    plain = isinstance(variable.dtype, np.dtype) and variable.dtype.kind not in "OT"
    if _on_dask(variable):
        if plain:
            return variable.data
        raise DTypeError(f"{key!r} is a Dask array of {variable.dtype}; give text a length first: .astype('U20')")
    if plain:
        return np.asarray(variable.values) if variable._in_memory else _Slow(variable)
    values = np.asarray(variable.values)
    if values.dtype.kind not in "OT":
        return values
    flat = values.ravel().tolist()
    for kind in (str, bytes):
        if flat and all(isinstance(v, kind) for v in flat):
            return np.array(flat, kind).reshape(values.shape)
    if not flat:
        return np.zeros(values.shape, "U1")
    odd = next((v for v in flat if not isinstance(v, str)), None)
    raise DTypeError(f"{key!r} has objects that are not all text, such as {odd!r}: fillna(''), or give it a dtype")


class _Slow:
    """A variable in another file, or whatever xarray loads when it is asked for: taken in pieces."""

    def __init__(self, variable: xr.Variable) -> None:
        self._variable = variable
        self.shape: tuple[int, ...] = variable.shape
        self.dtype: np.dtype[Any] = variable.dtype

    def pieces(self) -> Iterator[tuple[int, Any]]:
        """Where they begin along the first axis, and their values."""
        if not self.shape:
            yield 0, self._variable.values
            return
        rows = max(1, PIECE * self.shape[0] // max(1, self._variable.nbytes))
        for first in range(0, self.shape[0], rows):
            yield first, self._variable[first : first + rows].values


def _write(stores: list[tuple[Any, ZBigArray]], connection: Any, *, append: bool) -> None:
    """Have the workers write first: that is what may fail. What cannot be written leaves no shapes changed."""
    before = [array.shape for _, array in stores]
    theirs = [(x, array, append) for x, array in stores if not isinstance(x, (np.ndarray, _Slow))]
    try:
        if theirs:
            store_together(theirs, connection)
        for (x, array), shape in zip(stores, before, strict=True):
            if isinstance(x, (np.ndarray, _Slow)):
                _write_here(x, array, shape[0] if append else None)
    except BaseException:
        for (_, array), shape in zip(stores, before, strict=True):
            array.resize(shape)
        raise


def _write_here(x: Any, array: ZBigArray, end: int | None) -> None:
    """Write `x` as all of an array, or append it at `end`."""
    if end is not None:
        array.resize((end + x.shape[0], *array.shape[1:]))
    for start, values in x.pieces() if isinstance(x, _Slow) else [(0, x)]:
        if array.ndim:
            first = start + (end or 0)
            array[first : first + len(values)] = values
        else:
            array[...] = values
