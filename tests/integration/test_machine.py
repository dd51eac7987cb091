"""Several connections doing anything in any order, against a model in plain NumPy.

The model has the committed array, and for each connection the snapshot that it sees, with the connection's own
changes. After every step everything that any view shows is compared.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ZODB.POSException import ConflictError

import dask_zbig as dz
from dask_zbig.storage.format import LEAF_BYTES

from tests.conftest import Client, open_clients  # isort: skip

PAGE = 4096
ROOM = 200_000  # elements beyond the start that are written, of 2 bytes: more than a commit keeps inline
GAP = LEAF_BYTES // 2 - 1000  # at the border of two leaves
users = st.integers(0, 2)
values = st.integers(1, 60_000)
places = st.integers(0, 20) | st.sampled_from([2047, 2048, 2049, 100_000, 199_999, GAP, GAP + 999, GAP + 1000])
lengths = st.sampled_from([1, 1, 2, 30, 2048, 2049, 50_000, 120_000])


class User:
    """A connection, and what it should see: `seen`, which was committed at `version`, and changes."""

    def __init__(self, machine):
        self.client = machine.clients.connect(other=True)
        self.array = self.client.root["A"]
        self.views = []
        self.boundary(machine)

    def boundary(self, machine):
        self.seen = machine.committed.copy()
        self.version = machine.version
        self.changed = np.zeros(len(self.seen), bool)
        self.resized = False
        self.touched = False  # written to, if only what was there already
        self.savepoints = []

    def state(self):
        return self.seen.copy(), self.changed.copy(), self.resized


class Machine(RuleBasedStateMachine):
    kind = "filestorage"
    leaves = 1
    servers = None

    @initialize(start=st.sampled_from([10, 2048, 150_000]))
    def open(self, start):
        self.stack = contextlib.ExitStack()
        directory = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.clients = self.stack.enter_context(open_clients(self.kind, directory, self.servers))
        start += GAP + 10 if self.leaves > 1 else 0
        self.clients.new(start, "<u2")
        self.committed = np.zeros(start, "<u2")
        self.history = {}  # version -> (elements that it changed, whether the shape changed)
        self.version = 0
        self.users = [User(self) for _ in range(3 if self.leaves == 1 else 2)]

    def user(self, number):
        return self.users[number % len(self.users)]

    # -- data

    @rule(u=users, at=places, n=lengths, value=values, by_view=st.booleans())
    def write(self, u, at, n, value, by_view):
        user = self.user(u)
        where = slice(at, min(at + n, len(user.seen)))
        if where.start >= where.stop:
            return
        user.touched = True
        data = (np.arange(where.stop - where.start) + value).astype("<u2")
        if by_view:
            user.array[:][where] = data
        else:
            user.array[where] = data
        user.changed[where] |= user.seen[where] != data
        user.seen[where] = data

    @rule(u=users, at=places)
    def write_the_same(self, u, at):
        user = self.user(u)
        if at < len(user.seen):
            user.touched = True
            user.array[at] = user.seen[at]

    @rule(u=users)
    def keep_a_view(self, u):
        user = self.user(u)
        user.views = [*user.views[-2:], user.array[:]]

    @rule(u=users)
    def drop_views(self, u):
        self.user(u).views.clear()

    @rule(u=users, n=st.sampled_from([0, 1, 5, 2048, 40_000]), value=values)
    def append(self, u, n, value):
        user = self.user(u)
        if len(user.seen) + n > GAP + ROOM:
            return
        data = (np.arange(n) + value).astype("<u2")
        user.array.append(data)
        user.seen = np.concatenate([user.seen, data])
        user.changed = np.concatenate([user.changed, np.ones(n, bool)])
        user.resized |= n > 0

    @rule(u=users, size=st.sampled_from([0, 1, 9, 2047, 2048, 2049, 90_000, 150_000]), upper=st.booleans())
    def resize(self, u, size, upper):
        user = self.user(u)
        if self.leaves > 1 and upper:
            size += GAP
        if size == len(user.seen):
            return
        user.array.resize(size)
        kept = min(size, len(user.seen))
        seen, changed = np.zeros(size, "<u2"), np.ones(size, bool)
        seen[:kept], changed[:kept] = user.seen[:kept], user.changed[:kept]
        user.seen, user.changed, user.resized = seen, changed, True

    # -- transactions

    def expect_conflict(self, user):
        """Whether a commit must, may or must not conflict: True, None or False."""
        if not user.changed.any() and not user.resized and not user.touched:
            return False
        sure = maybe = False
        for version in range(user.version + 1, self.version + 1):
            theirs, resized = self.history[version]
            n = min(len(theirs), len(user.changed))
            both = bool((theirs[:n] & user.changed[:n]).any())
            sure |= both or (resized and user.resized)
            # a change of shape meets a change of data: shrinking conflicts; and a storage may merge nothing
            maybe |= resized or user.resized or not self.clients.merges
        return True if sure else None if maybe else False

    @rule(u=users)
    def commit(self, u):
        user = self.user(u)
        expected = self.expect_conflict(user)
        try:
            user.client.commit()
            conflict = False
        except ConflictError:
            user.client.abort()
            conflict = True
        assert expected is None or conflict == expected
        changed = user.changed.any() or user.resized
        if changed and not conflict:
            after = user.seen.copy()
            if user.version != self.version:  # merged with what others committed
                base = self.committed
                if not user.resized:
                    after = base.copy()
                    n = min(len(base), len(user.seen))
                    after[:n][user.changed[:n]] = user.seen[:n][user.changed[:n]]
                else:
                    n = min(len(base), len(user.seen))
                    take = ~user.changed[:n]
                    after[:n][take] = base[:n][take]
            self.version += 1
            self.history[self.version] = (user.changed.copy(), user.resized)
            self.committed = after
        self.begin_all(user)

    def begin_all(self, user):
        user.client.begin()
        user.boundary(self)

    @rule(u=users)
    def abort(self, u):
        user = self.user(u)
        user.client.abort()
        self.begin_all(user)

    @rule(u=users)
    def begin(self, u):
        self.begin_all(self.user(u))

    @rule(u=users)
    def savepoint(self, u):
        user = self.user(u)
        user.savepoints = [*user.savepoints[-3:], (user.client.savepoint(), user.state())]

    @rule(u=users, which=st.integers(0, 3))
    def rollback(self, u, which):
        user = self.user(u)
        if not user.savepoints:
            return
        which %= len(user.savepoints)
        savepoint, state = user.savepoints[which]
        savepoint.rollback()
        user.seen, user.changed, user.resized = (state[0].copy(), state[1].copy(), state[2])
        user.savepoints = user.savepoints[: which + 1]

    # -- connections

    @rule(u=users)
    def cache_minimize(self, u):
        self.user(u).client.connection.cacheMinimize()

    @rule(u=users)
    def cache_gc(self, u):
        self.user(u).client.connection.cacheGC()
        gc.collect()

    @rule(u=users)
    def reopen(self, u):
        user = self.user(u)
        user.client.close()
        self.users[u % len(self.users)] = User(self)

    @rule()
    def pack(self):
        """As ZODB is: whoever reads at an older snapshot may find it packed away."""
        if self.kind != "mapping" and all(user.version == self.version for user in self.users):
            self.clients.db.pack()

    # -- what must hold

    @invariant()
    def everybody_sees_what_they_should(self):
        for user in getattr(self, "users", ()):
            assert user.array.shape == user.seen.shape
            self.compare(user.array[:], user.seen)
            for view in user.views:
                n = min(len(view), len(user.seen))
                self.compare(view[:n], user.seen[:n])

    @staticmethod
    def compare(got, expected):
        for lo, hi in [(0, ROOM), (GAP - ROOM, None)]:  # what lies between is nobody's
            if lo < len(expected):
                np.testing.assert_array_equal(got[lo:hi], expected[lo:hi])

    def teardown(self):
        if not hasattr(self, "users"):
            return
        for user in self.users:
            user.client.abort()
            user.views.clear()
        fresh = Client(self.clients, self.clients.db)
        fresh.begin()
        self.compare(fresh.root["A"][:], self.committed)
        fresh.close()
        assert self.clients.scratch() == []
        self.users.clear()
        self.stack.close()


# Shrinking takes minutes: ask for it when there is something to shrink.
PHASES = list(Phase) if "ZBIG_SHRINK" in os.environ else [Phase.explicit, Phase.generate]
QUICK = settings(max_examples=12, stateful_step_count=20, phases=PHASES)
LONG = settings(
    max_examples=int(os.environ.get("ZBIG_EXAMPLES", "300")),
    stateful_step_count=60,
    phases=PHASES,
    derandomize="CI" in os.environ,  # there a failure must be that of the change
    print_blob=True,
)


class FileStorageMachine(Machine):
    """Blobs."""


class BloblessMachine(Machine):
    kind = "blobless"


class MappingMachine(Machine):
    kind = "mapping"


class DeepMachine(Machine):
    """With a node above the leaves, and changes at the border of two leaves."""

    leaves = 2


class ZEOMachine(Machine):
    kind = "zeo"


class ZEOCacheMachine(Machine):
    kind = "zeo-cache"


MACHINES = [FileStorageMachine, BloblessMachine, MappingMachine, DeepMachine, ZEOMachine, ZEOCacheMachine]


def run(machine, request, options):
    from hypothesis.stateful import run_state_machine_as_test

    machine.servers = request
    run_state_machine_as_test(machine, settings=options)


@pytest.mark.parametrize("machine", MACHINES)
def test_machine(machine, request):
    run(machine, request, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_long_machine(machine, request):
    run(machine, request, LONG)


def test_elements_are_of_two_bytes():
    assert dz.ZBigArray(1, "<u2").granule == 2
