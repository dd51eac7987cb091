"""Transactional NumPy arrays bigger than RAM and disk, stored in ZODB and computed on by Dask."""

from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.coordinator import CommitCoordinator, SaveResult, to_zbigarray
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
    PublishError,
    ScratchError,
    ServerError,
    ShapeError,
    SnapshotError,
    UncommittedChangesError,
    WindowError,
    ZBigError,
)
from dask_zbig.server import serve

__all__ = [
    "ClosedError",
    "CommitCoordinator",
    "CopyError",
    "DTypeError",
    "DatabaseURIError",
    "DatabaseUnavailableError",
    "ForkError",
    "FormatError",
    "IndexingError",
    "LoadError",
    "NotStoredError",
    "PublishError",
    "SaveResult",
    "ScratchError",
    "ServerError",
    "ShapeError",
    "SnapshotError",
    "UncommittedChangesError",
    "WindowError",
    "ZBigArray",
    "ZBigError",
    "from_zbigarray",
    "open",
    "serve",
    "to_zbigarray",
]
