"""Transactional NumPy arrays bigger than RAM and disk, stored in ZODB and computed on by Dask."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import dask_zbig.cluster  # noqa: F401 - how pickle and Dask take an array
from dask_zbig.array.arrayref import ArrayRef
from dask_zbig.array.group import ArrayGroup
from dask_zbig.array.ramarray import RAMArray
from dask_zbig.array.zbigarray import ZBigArray
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
    OptionError,
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

if TYPE_CHECKING:
    from dask_zbig.checking import CheckReport, Damage, check
    from dask_zbig.cluster.conflict import SaveConflictError
    from dask_zbig.cluster.coordinator import CommitCoordinator, SaveResult, to_zbigarray
    from dask_zbig.cluster.janitor import GarbageReport, collect_garbage
    from dask_zbig.cluster.save import SaveProgress, StagedSave
    from dask_zbig.cluster.source import from_zbigarray
    from dask_zbig.ecosystem.xarray import from_xarray, to_xarray

__all__ = [
    "ArrayGroup",
    "ArrayRef",
    "CheckReport",
    "ClosedError",
    "CommitCoordinator",
    "CopyError",
    "DTypeError",
    "Damage",
    "DatabaseURIError",
    "DatabaseUnavailableError",
    "ForkError",
    "FormatError",
    "GarbageReport",
    "IndexingError",
    "LoadError",
    "NotStoredError",
    "OptionError",
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
    "check",
    "collect_garbage",
    "from_xarray",
    "from_zbigarray",
    "open",
    "serve",
    "to_xarray",
    "to_zbigarray",
]

#: What is imported when it is first asked for: it needs Dask's arrays, or `distributed`.
_LATER = {
    "CheckReport": "dask_zbig.checking",
    "CommitCoordinator": "dask_zbig.cluster.coordinator",
    "Damage": "dask_zbig.checking",
    "GarbageReport": "dask_zbig.cluster.janitor",
    "SaveConflictError": "dask_zbig.cluster.conflict",
    "SaveProgress": "dask_zbig.cluster.save",
    "SaveResult": "dask_zbig.cluster.coordinator",
    "StagedSave": "dask_zbig.cluster.save",
    "check": "dask_zbig.checking",
    "collect_garbage": "dask_zbig.cluster.janitor",
    "from_xarray": "dask_zbig.ecosystem.xarray",
    "from_zbigarray": "dask_zbig.cluster.source",
    "to_xarray": "dask_zbig.ecosystem.xarray",
    "to_zbigarray": "dask_zbig.cluster.coordinator",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # pyproject.toml has it, and nothing else
        return importlib.import_module("importlib.metadata").version("dask_zbig")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
