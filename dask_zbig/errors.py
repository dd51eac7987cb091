"""The one tree of exceptions that dask_zbig raises.

Each class derives from :class:`ZBigError` and from the builtin that fits, so both ``except
dz.ZBigError`` and, say, ``except ValueError`` do what a reader expects. Conflicts between
transactions are not here: they are ZODB's own ``ConflictError``, which every retry loop for
ZODB already knows.
"""

from __future__ import annotations

from ZODB.POSException import POSError

__all__ = [
    "ClosedError",
    "CopyError",
    "DTypeError",
    "DatabaseURIError",
    "DatabaseUnavailableError",
    "ForkError",
    "FormatError",
    "IndexingError",
    "LoadError",
    "NotStoredError",
    "OptionError",
    "OutcomeUnknownError",
    "PickleError",
    "PublishError",
    "ScratchError",
    "ServerError",
    "ShapeError",
    "SnapshotError",
    "UncommittedChangesError",
    "ViewError",
    "WindowError",
    "ZBigError",
]


class ZBigError(Exception):
    """Base of every error raised by dask_zbig."""


class LoadError(ZBigError, OSError):
    """Bytes of an array could not be loaded: server gone, file missing, damaged or too short."""


class ScratchError(ZBigError, OSError):
    """A change could not be written to its scratch file, usually because the disk is full."""


class ClosedError(ZBigError, RuntimeError):
    """An array was used after its connection had been closed."""


class ForkError(ZBigError, RuntimeError):
    """An array opened before ``fork`` was used in the child process."""


class WindowError(ZBigError, MemoryError):
    """No address range (or no mapping) could be had for a view."""


class FormatError(ZBigError, ValueError, POSError):  # type: ignore[misc]
    """A stored object has an unknown format version, or a state that breaks the format's rules.

    (It is ZODB's POSError too, so that ZODB lets it through when it meets such an object.)
    """


class DTypeError(ZBigError, TypeError):
    """A dtype that cannot be stored, such as ``object``, or values that cannot be cast to it."""


class CopyError(ZBigError, TypeError):
    """A stored array cannot be copied as a Python object: its bytes are elsewhere."""


class PickleError(ZBigError, TypeError):
    """An array that other processes could not find as it is, not stored or changed, was to be pickled."""


class ViewError(ZBigError, ValueError):
    """Something that is no view of a stored array was used where one is needed."""


class ShapeError(ZBigError, ValueError):
    """A shape, or a pair of shapes, that makes no sense for the operation."""


class IndexingError(ZBigError, IndexError):
    """An index that NumPy would refuse too: out of bounds, or too many indices."""


class NotStoredError(ZBigError, ValueError):
    """An array that was never committed was used where a stored one is needed."""


class UncommittedChangesError(ZBigError, RuntimeError):
    """The operation needs a committed state, but there are uncommitted changes."""


class SnapshotError(ZBigError, LookupError):
    """A snapshot that the database does not have: in the future, or packed away."""


class DatabaseURIError(ZBigError, ValueError):
    """Text that names no database: an unknown scheme, or settings that cannot be read."""


class OptionError(ZBigError, ValueError):
    """An option of the configuration has a value that cannot be read."""


class DatabaseUnavailableError(ZBigError, RuntimeError):
    """A database that cannot be opened from here, or that this process must not open."""


class ServerError(ZBigError, RuntimeError):
    """The ZEO server process did not start, or ended when it should not have."""


class PublishError(ZBigError, RuntimeError):
    """A cluster's staged data cannot be published: the job is unknown or incomplete."""


class OutcomeUnknownError(ZBigError, RuntimeError):
    """The answer to a commit was lost, and nobody can be asked now whether it was done."""
