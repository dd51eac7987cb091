"""Why a save conflicts: which of its bytes another transaction has changed."""

from __future__ import annotations

from ZODB.POSException import ConflictError

from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.worker import reading
from dask_zbig.database import Location
from dask_zbig.errors import ZBigError
from dask_zbig.storage import extents as ex
from dask_zbig.storage.leafstate import LeafState
from dask_zbig.storage.tree import ZBigFile

__all__ = ["SaveConflictError", "changed_between", "conflict"]


class SaveConflictError(ZBigError, ConflictError):  # type: ignore[misc]
    """Another transaction has changed what a save would change. What was staged is kept: see `CommitCoordinator.retry`.

    Attributes
    ----------
    array : ZBigArray
    ranges : list of (int, int)
        The bytes of the array, from and up to.
    """

    def __init__(
        self, message: str, array: ZBigArray | None = None, ranges: list[tuple[int, int]] | None = None
    ) -> None:
        ConflictError.__init__(self, message)
        self.array = array
        self.ranges = ranges or []


def changed_between(location: Location, oid: bytes, before: bytes, after: bytes, ranges: ex.Ranges) -> ex.Ranges:
    """The part of `ranges` of an array's bytes that differs between two snapshots, as far as the extent map tells."""
    changed = ex.no_ranges()
    with reading(location, before, 0) as old, reading(location, after, 0) as new:
        sides = [_leaves(connection.get(oid)._file, ranges) for connection in (old, new)]
        for index in sorted({*sides[0], *sides[1]}):
            was, now = (side.get(index, LeafState(ex.empty(), ())) for side in sides)
            here = ex.diff(was.extents, was.keys(), now.extents, now.keys())
            # What was only joined with its neighbours is where it was, for a reader.
            here = ex.intersect(here, ex.diff(*was.before_move(), *now.before_move()))
            here = ex.intersect(here, ex.diff(was.extents, was.keys(), *now.before_move()))
            changed = ex.union(changed, here)
    return ex.intersect(changed, ranges)


def _leaves(file: ZBigFile, ranges: ex.Ranges) -> dict[int, LeafState]:
    found = (leaf for lo, hi in ranges.tolist() for leaf in file.leaves(lo, hi))
    return {index: LeafState(leaf.extents, leaf.refs, leaf.move) for index, leaf in found}


def conflict(array: ZBigArray, ranges: ex.Ranges) -> SaveConflictError:
    """The error that names these bytes of the array."""
    listed = [(lo, hi) for lo, hi in ranges.tolist()]
    lo, hi = listed[0][0], listed[-1][1]
    first, last = (_index(array, position) for position in (lo, hi - 1))
    return SaveConflictError(
        f"another transaction has changed elements of {array!r} that this save changes, among those from {first} to "
        f"{last} (bytes {lo} to {hi}). What was staged is kept: `retry()` saves it over theirs",
        array,
        listed,
    )


def _index(array: ZBigArray, position: int) -> str:
    """The index of the element at a byte."""
    number, index = position // array.itemsize, []
    axes = list(array.shape) if array.order == "F" else list(reversed(array.shape))
    for n in axes[:-1]:
        number, i = divmod(number, max(n, 1))
        index.append(i)
    if axes:
        index.append(number)
    return str(index if array.order == "F" else index[::-1])
