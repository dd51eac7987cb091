"""`ArrayGroup`: arrays that belong together, with named dimensions and attributes; what xarray calls a dataset.

Needs no xarray: a server, or a program that only wants the arrays, loads it too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from datetime import date, datetime, time, timedelta
from typing import Any, TypeAlias

import numpy as np
from persistent import Persistent

from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.errors import DTypeError, ShapeError
from dask_zbig.storage.format import VERSION, broken, unpack_state

__all__ = ["ArrayGroup", "checked_attrs"]

#: What an attribute may be, besides lists, tuples and dicts of these: nothing whose class must be importable later.
_PLAIN = (str, bytes, bool, int, float, complex, type(None), date, datetime, time, timedelta, np.generic)


#: An array, the names of its axes, whether it is a coordinate, its attributes.
_About: TypeAlias = tuple[ZBigArray, tuple[str, ...], bool, dict[str, Any]]


class ArrayGroup(Persistent, MutableMapping[str, ZBigArray]):  # type: ignore[misc]
    """Arrays by name, with the names of their dimensions, attributes of each and of them all.

    A persistent mapping, stored like any other object: ``root["weather"] = group``; ``group["wind"]`` is a
    `ZBigArray`. Usually made by `from_xarray` and read by `to_xarray`.

    Parameters
    ----------
    attrs : mapping, optional
        See `set_attrs`.

    Examples
    --------
    >>> import dask_zbig as dz
    >>> group = dz.ArrayGroup({"title": "two stations"})
    >>> group.add("wind", dz.ZBigArray((3, 2), "f4"), ("time", "station"), {"units": "m/s"})
    >>> group.dims("wind"), group.sizes(), group.attrs("wind")
    (('time', 'station'), {'time': 3, 'station': 2}, {'units': 'm/s'})
    """

    def __init__(self, attrs: Mapping[str, Any] | None = None) -> None:
        self._attrs = checked_attrs(attrs or {}, "the group")
        self._about: dict[str, _About] = {}

    # -- persistence

    def __getstate__(self) -> tuple[Any, ...]:
        return VERSION, self._attrs, self._about

    def __setstate__(self, state: Any) -> None:
        attrs, about = unpack_state(self, state, 2)
        if not isinstance(attrs, dict) or not isinstance(about, dict):
            raise broken(self, f"has fields of wrong types: {type(attrs).__name__}, {type(about).__name__}")
        for name, one in about.items():
            if not isinstance(name, str) or not isinstance(one, tuple) or len(one) != 4:
                raise broken(self, f"has {name!r}, which is no array with dimensions and attributes")
        self._about, self._attrs = about, attrs

    # -- arrays

    def add(
        self,
        name: str,
        array: ZBigArray,
        dims: Sequence[str],
        attrs: Mapping[str, Any] | None = None,
        *,
        coordinate: bool = False,
    ) -> None:
        """Put an array into the group, in place of one of that name.

        Parameters
        ----------
        name : str
        array : ZBigArray
        dims : sequence of str
            A name for each axis.
        attrs : mapping, optional
            See `set_attrs`.
        coordinate : bool
            Whether it says where the elements of others are, rather than what they are.

        Raises
        ------
        ShapeError
            If there is not one name for each axis, or a dimension has another length in another array.
        DTypeError
            If an attribute is of a type that is not stored.
        """
        if not isinstance(name, str) or not isinstance(array, ZBigArray):
            raise DTypeError(f"a group has ZBigArrays by name (str), not {type(array).__name__} by {name!r}")
        names = tuple(dims)
        if len(set(names)) != array.ndim or len(names) != array.ndim or not all(isinstance(d, str) for d in names):
            raise ShapeError(f"{name!r} has {array.ndim} axes and needs as many names for them, not {names!r}")
        sizes = self.sizes(without=name)
        for dim, n in zip(names, array.shape, strict=True):
            if sizes.get(dim, n) != n:
                raise ShapeError(f"dimension {dim!r} has length {n} in {name!r}, but {sizes[dim]} in other arrays")
        self._about[name] = array, names, bool(coordinate), checked_attrs(attrs or {}, repr(name))
        self._p_changed = True

    def __getitem__(self, name: str) -> ZBigArray:
        return self._about[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._about)

    def __len__(self) -> int:
        return len(self._about)

    def __setitem__(self, name: str, array: ZBigArray) -> None:
        """Replace an array by another one with the same dimensions. For a new one, see `add`."""
        if name not in self._about:
            raise ShapeError(f"{name!r} is new here, and needs names for its axes: use add({name!r}, array, dims)")
        _, dims, coordinate, attrs = self._about[name]
        self.add(name, array, dims, attrs, coordinate=coordinate)

    def __delitem__(self, name: str) -> None:
        del self._about[name]
        self._p_changed = True

    def dims(self, name: str) -> tuple[str, ...]:
        """The names of an array's axes. Raises KeyError."""
        return self._about[name][1]

    def is_coordinate(self, name: str) -> bool:
        """Whether an array is a coordinate. Raises KeyError."""
        return self._about[name][2]

    def sizes(self, *, without: str | None = None) -> dict[str, int]:
        """The length of each dimension, by name; of all arrays but one, if that is asked for."""
        return {
            dim: n
            for name, (array, dims, _, _) in self._about.items()
            if name != without
            for dim, n in zip(dims, array.shape, strict=True)
        }

    # -- attributes

    def attrs(self, name: str | None = None) -> dict[str, Any]:
        """A copy of an array's attributes, or of the group's. Raises KeyError."""
        return copy.deepcopy(self._attrs if name is None else self._about[name][3])

    def set_attrs(self, attrs: Mapping[str, Any], name: str | None = None) -> None:
        """Give an array, or the group, other attributes.

        Parameters
        ----------
        attrs : mapping
            By str: numbers, text, bytes, dates, None, NumPy's scalars and arrays (but of objects), and lists, tuples
            and dicts of these.
        name : str, optional
            Of an array; else they are the group's.

        Raises
        ------
        DTypeError
            For anything else. Nothing was changed.
        KeyError
            If there is no such array.
        """
        checked = checked_attrs(attrs, "the group" if name is None else repr(name))
        if name is None:
            self._attrs = checked
        else:
            self._about[name] = (*self._about[name][:3], checked)
            self._p_changed = True

    # (of mappings that compare by value there would be elements to compare)
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        sizes = ", ".join(f"{dim}: {n}" for dim, n in self.sizes().items())
        return f"<{type(self).__name__} ({sizes}) {', '.join(self)}>"


def checked_attrs(attrs: Mapping[str, Any], of: str) -> dict[str, Any]:
    """A deep copy of attributes, or `DTypeError` naming the one that cannot be stored."""
    for key, value in attrs.items():
        if not isinstance(key, str):
            raise DTypeError(f"an attribute of {of} is called {key!r}; that must be a str")
        _check(value, f"attribute {key!r} of {of}")
    return copy.deepcopy(dict(attrs))


def _check(value: Any, what: str) -> None:
    if type(value) in (list, tuple, dict):
        for one in value if type(value) is not dict else [*value, *value.values()]:
            _check(one, what)
    elif isinstance(value, np.ndarray) and type(value) is np.ndarray:
        if value.dtype.hasobject:
            raise DTypeError(f"{what} is an array of objects, which cannot be stored; make it a list")
    elif not (type(value) in _PLAIN or isinstance(value, np.generic)):
        raise DTypeError(f"{what} is a {type(value).__name__}; stored are numbers, text, dates, arrays, lists, dicts")
