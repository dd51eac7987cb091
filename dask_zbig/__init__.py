"""Transactional NumPy arrays bigger than RAM and disk, stored in ZODB and computed on by Dask."""

from dask_zbig.array.arrayref import ArrayRef
from dask_zbig.array.ramarray import RAMArray
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.conflict import SaveConflictError
from dask_zbig.cluster.coordinator import CommitCoordinator, SaveResult, to_zbigarray
from dask_zbig.cluster.janitor import GarbageReport, collect_garbage
from dask_zbig.cluster.save import SaveProgress, StagedSave
from dask_zbig.cluster.source import from_zbigarray
from dask_zbig.database import open
from dask_zbig.errors import (
    ClosedError,
    CopyError,
    DatabaseUnavailableError,
    DatabaseURIError,
    DTypeError,
    ForkError,
    FormatError,
    IndexingError,
    LoadError,
    NotStoredError,
    OutcomeUnknownError,
    PickleError,
    PublishError,
    ScratchError,
    ServerError,
    ShapeError,
    SnapshotError,
    UncommittedChangesError,
    ViewError,
    WindowError,
    ZBigError,
)
from dask_zbig.server import serve

__all__ = [
    "ArrayRef",
    "ClosedError",
    "CommitCoordinator",
    "CopyError",
    "DTypeError",
    "DatabaseURIError",
    "DatabaseUnavailableError",
    "ForkError",
    "FormatError",
    "GarbageReport",
    "IndexingError",
    "LoadError",
    "NotStoredError",
    "OutcomeUnknownError",
    "PickleError",
    "PublishError",
    "RAMArray",
    "SaveConflictError",
    "SaveProgress",
    "SaveResult",
    "ScratchError",
    "ServerError",
    "ShapeError",
    "SnapshotError",
    "StagedSave",
    "UncommittedChangesError",
    "ViewError",
    "WindowError",
    "ZBigArray",
    "ZBigError",
    "collect_garbage",
    "from_zbigarray",
    "open",
    "serve",
    "to_zbigarray",
]
