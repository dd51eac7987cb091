"""The different values of small arrays.

``np.unique`` imports ``numpy.ma`` when it is first called, which costs the first view of a process 30 ms; ``np.isin``
takes ten times as long for a few values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["among", "distinct", "first_of_each", "numbered"]

_Integers = npt.NDArray[np.integer[Any]]


def distinct(values: _Integers) -> _Integers:
    """The values, ascending, each once.

    >>> distinct(np.array([3, 1, 3])).tolist()
    [1, 3]
    """
    ordered = np.sort(values)
    return ordered[_heads(ordered)]


def first_of_each(values: _Integers) -> tuple[_Integers, npt.NDArray[np.intp]]:
    """The values, ascending, each once; and where each comes first.

    >>> [part.tolist() for part in first_of_each(np.array([3, 1, 3]))]
    [[1, 3], [1, 0]]
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    heads = _heads(ordered)
    return ordered[heads], order[heads]


def numbered(values: _Integers) -> tuple[_Integers, npt.NDArray[np.intp]]:
    """The values, ascending, each once; and for each of `values`, its number among them.

    >>> [part.tolist() for part in numbered(np.array([3, 1, 3]))]
    [[1, 3], [1, 0, 1]]
    """
    found = distinct(values)
    return found, np.searchsorted(found, values)


def among(values: _Integers, chosen: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """For each value, whether it is one of the `chosen`.

    >>> among(np.array([3, 1, 3]), [3, 4]).tolist()
    [True, False, True]
    """
    ordered = np.sort(np.asarray(chosen, values.dtype))
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    at = np.searchsorted(ordered, values)
    found: npt.NDArray[np.bool_] = ordered.take(at, mode="clip") == values
    return found


def _heads(ordered: _Integers) -> npt.NDArray[np.bool_]:
    heads = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=heads[1:])
    return heads
