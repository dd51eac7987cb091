"""Where ZODB and `transaction` have no hook for what we must know: methods of single objects, wrapped.

Only names that these packages have had for ten years, and each on the one object that we serve.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import MutableMapping
from typing import Any, Protocol

from dask_zbig.failedcommits import guard_commits

__all__ = ["Guarded", "guard_connection", "watch_get", "watch_unjoin"]


class Guarded(Protocol):
    """The data manager of a connection."""

    def current(self) -> bool:
        """Whether it still serves its connection."""

    def newTransaction(self, current: Any) -> None:  # noqa: N802 - transaction's name
        """A transaction has begun."""

    def moving(self) -> contextlib.AbstractContextManager[None]:
        """The connection polls for invalidations and processes them."""

    def connection_rolled_back(self) -> None:
        """The connection is back at a savepoint."""

    def stays(self, current: Any) -> bool:
        """A rollback to an older savepoint wants it out of the transaction. Does it go?"""

    def refuse_close(self) -> None:
        """Raise if closing would lose changes."""

    def close(self) -> None:
        """The connection is closed."""


def guard_connection(connection: Any, managers: MutableMapping[Any, Any]) -> None:
    """Tell the manager that `managers` has for this Connection what happens to that.

    ``newTransaction``: other synchronizers may run before the connection has polled for invalidations, or
    after; this is the one place that knows. ``close``: ZODB refuses to close a connection with changed objects,
    but what close callbacks raise is only logged. ``_rollback_savepoint``: an array may become known to us by the
    very savepoint that the connection takes, when it is too late to take part in it. And see `guard_commits`.
    """
    if "_zbig_guarded" in connection.__dict__:
        return
    cls = type(connection)

    def new_transaction(self: Any, current: Any, sync: bool = True) -> None:
        manager = managers.get(self)
        with manager.moving() if manager is not None and manager.current() else contextlib.nullcontext():
            cls.newTransaction(self, current, sync)

    def close(self: Any, primary: bool = True) -> None:
        manager = managers.get(self)
        if manager is not None and self._needs_to_join:  # else ZODB refuses
            manager.refuse_close()
            managers.pop(self, None)
            manager.close()
        cls.close(self, primary)

    def rollback_savepoint(self: Any, state: Any) -> None:
        cls._rollback_savepoint(self, state)
        manager = managers.get(self)
        if manager is not None and manager.current():
            manager.connection_rolled_back()

    guard_commits(connection)
    connection._rollback_savepoint = types.MethodType(rollback_savepoint, connection)
    connection.newTransaction = types.MethodType(new_transaction, connection)
    connection.close = types.MethodType(close, connection)
    connection._zbig_guarded = True


def watch_get(transaction_manager: Any, manager: Guarded) -> None:
    """Tell a manager of transactions that begin because somebody asks for the current one and there is none.

    Of these synchronizers are not told. But a view that is kept may have been written to, and the first thing that
    is asked of the transaction may be a savepoint.
    """
    watching = transaction_manager.__dict__.get("_zbig_watching")
    if watching is None:
        watching = transaction_manager._zbig_watching = weakref.WeakSet()
        cls = type(transaction_manager)

        def get(self: Any) -> Any:
            begins = self._txn is None
            current = cls.get(self)
            if begins:
                for one in list(watching):
                    if one.current():
                        one.newTransaction(current)
            return current

        transaction_manager.get = types.MethodType(get, transaction_manager)
    watching.add(manager)


def watch_unjoin(current: Any, kind: type[Guarded]) -> None:
    """Have a transaction ask before it lets a data manager of ours go: its views may be written to after that."""
    if "_unjoin" in current.__dict__:
        return
    cls = type(current)

    def unjoin(self: Any, resource: Any) -> None:
        if not (isinstance(resource, kind) and resource.stays(self)):
            cls._unjoin(self, resource)

    current._unjoin = types.MethodType(unjoin, current)
