"""What is tried again, for how long, and what is not."""

from __future__ import annotations

import concurrent.futures
import errno

import dask
import pytest
from ZEO.Exceptions import ClientDisconnected
from ZODB.POSException import ConflictError, POSKeyError, ReadConflictError

from dask_zbig.errors import LoadError
from dask_zbig.patience import may_heal, patiently


def caused_by(cause):
    error = LoadError("cannot load")
    error.__cause__ = cause
    return error


HEALS = [
    ClientDisconnected("away"),
    ConnectionResetError(),
    TimeoutError(),
    concurrent.futures.TimeoutError(),
    OSError(errno.EMFILE, "too many"),
    OSError(errno.ESTALE, "stale"),
]
STAYS = [
    ConflictError("changed"),
    ReadConflictError("changed"),
    POSKeyError(b"x"),
    OSError(errno.EIO, "io"),
    LoadError("no"),
]


@pytest.mark.parametrize("error", HEALS, ids=lambda e: type(e).__name__)
def test_what_may_heal(error):
    assert may_heal(error)
    assert may_heal(caused_by(error))
    assert may_heal(caused_by(caused_by(error)))


@pytest.mark.parametrize("error", STAYS, ids=lambda e: type(e).__name__)
def test_what_stays_as_it_is(error):
    assert not may_heal(error)
    assert not may_heal(caused_by(error))


def test_a_conflict_is_raised_at_once():
    calls = []

    def load():
        calls.append(1)
        raise ReadConflictError("changed")

    with pytest.raises(ReadConflictError):
        patiently(load)
    assert len(calls) == 1


def test_the_last_error_is_raised_when_the_time_is_over():
    calls = []

    def load():
        calls.append(1)
        raise ConnectionError(f"away {len(calls)}")

    with dask.config.set({"zbig.load-timeout": 1}), pytest.raises(ConnectionError) as caught:
        patiently(load)
    assert len(calls) > 1
    assert str(caught.value) == f"away {len(calls)}"
