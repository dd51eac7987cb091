"""Several connections doing anything in any order, against a model in plain NumPy.

The model has the committed array with a few counters beside it, and for each connection the snapshot that it sees,
with the connection's own changes. After every step everything that any view shows is compared.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile

import numpy as np
import pytest
import transaction
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from persistent.mapping import PersistentMapping
from ZODB.POSException import UndoError

import dask_zbig as dz
from dask_zbig.database import sync

from tests.actions import actions, users  # isort: skip
from tests.actor import COUNTERS, SAVEPOINTS, Actor, Historical, RemoteActors  # isort: skip
from tests.conftest import open_clients  # isort: skip
from tests.machine import DEEP, FLAT, GAP, ROOM, Change, Seen, Snapshot, sized, undo  # isort: skip

REMEMBERED = 4  # snapshots, and changes that may be undone


class User:
    """An actor, what it should see, and what it should see again after a rollback."""

    def __init__(self, actor, machine):
        self.actor = actor
        self.boundary(machine)
        self.views = []  # how long each is

    def boundary(self, machine):
        self.seen = Seen(machine.committed, machine.version)
        self.savepoints = []


class Machine(RuleBasedStateMachine):
    kind = "filestorage"
    regions = FLAT
    count = 3
    undoes = False
    packs = False
    servers = None
    remote = None

    @initialize(start=st.sampled_from([10, 2048, 150_000]))
    def open(self, start):
        self.stack = contextlib.ExitStack()
        directory = self.stack.enter_context(tempfile.TemporaryDirectory())
        start += GAP + 10 if self.regions is DEEP else 0
        if self.kind == "demo":  # in what lies below
            with open_clients("filestorage", directory, self.servers) as below:
                self.create(below, start)
        self.clients = self.stack.enter_context(open_clients(self.kind, directory, self.servers))
        if self.kind != "demo":
            self.create(self.clients, start)
        self.committed = Snapshot(np.zeros(self.regions.model_size(start), "<u2"), (0,) * COUNTERS)
        self.version = 0
        self.changes = []  # one for each version since `first`
        self.first = 0
        self.past = [(self.clients.db.lastTransaction(), self.committed.parts(self.regions))]
        self.kept = []  # historical connections
        self.users = [User(self.actor(number), self) for number in range(self.count)]

    @staticmethod
    def create(clients, start):
        client = clients.connect()
        client.root["A"] = dz.ZBigArray(start, "<u2")
        client.root["counters"] = tuple(PersistentMapping(n=0) for _ in range(COUNTERS))
        client.commit()
        client.close()

    def actor(self, number):
        if self.remote is not None and number == 1:
            return self.remote.new()
        return Actor(self.clients.database(other=True))

    @rule(u=users, action=actions)
    def act(self, u, action):
        name, given = action
        getattr(self, name)(self.users[u % len(self.users)], **given)

    # -- data

    def size(self, user):
        """How long its array is."""
        return self.regions.size(len(user.seen.array))

    def where(self, at, n, step, size):
        """A slice of what is somebody's; None if there is nothing."""
        if not size:
            return None
        at %= size
        stop = min(at + n, size, ROOM if self.regions is DEEP and at < ROOM else size)
        if step > 0:
            return slice(at, stop, step)
        return slice(stop - 1, at - 1 if at else None, step)

    def expect(self, user, places, data):
        """This has been written. An old view may be longer than the array is."""
        inside = places < self.size(user)
        user.seen.write(self.regions.model_places(places[inside]), data[inside])

    def write_and_commit(self, user, **what):
        self.write(user, **what)
        self.commit(user)

    def write(self, user, *, at, n, step, value, scalar, how, which):
        size = self.size(user)
        if how == "kept":
            if not user.views:
                return
            which %= len(user.views)
            size = user.views[which]
        where = self.where(at, n, step, size)
        if where is None:
            return
        places = np.arange(*where.indices(size))
        data = np.full(len(places), value, "<u2")
        if not scalar:
            data = (np.arange(len(data)) + value).astype("<u2")
        given = value if scalar else data
        if how == "array":
            user.actor.write(where, given)
        elif how == "fancy":
            user.actor.write(places, given)
        elif how == "view":
            user.actor.write_by_view(where, given)
        else:
            user.actor.write_by_kept_view(which, where, given)
        self.expect(user, places, data)

    def write_between(self, user, *, which, at, n, value, other):
        """After one transaction and before the next, while somebody else commits."""
        self.begin(user, abort=False)
        if not user.views or not len(user.seen.array):
            return
        user.actor.abort()
        size = min(user.views[which % len(user.views)], self.size(user))
        where = self.where(at, n, 1, size)
        if where is None:
            return
        user.actor.write_by_kept_view(which % len(user.views), where, value)
        changed = self.regions.model_places(np.arange(where.start, where.stop))
        changed = changed[user.seen.array[changed] != value]
        self.write_and_commit(next(u for u in self.users if u is not user), **other)
        meanwhile = self.changes[user.seen.version - self.first :]
        user.actor.begin()
        user.boundary(self)
        changed = changed[changed < len(user.seen.array)]
        user.seen.write(changed, np.full(len(changed), value, "<u2"))
        if any(np.isin(changed, change.where).any() for change in meanwhile):
            self.finish(user, True)
        elif any(change.scattered or change.resized for change in meanwhile):
            self.finish(user, None)

    def write_the_same(self, user, at):
        where = self.where(at, 1, 1, self.size(user))
        if where is not None:
            place = self.regions.model_places(np.array([where.start]))
            user.actor.write(where, user.seen.array[place])
            user.seen.write(place, user.seen.array[place])

    def count_up(self, user, which):
        """An object of ZODB's own: it shall be there just when the array's changes are."""
        user.actor.count(which)
        user.seen.counters[which] += 1

    def read(self, user, at, n, step):
        size = self.size(user)
        where = self.where(at, n, step, size)
        if where is not None:
            places = self.regions.model_places(np.arange(*where.indices(size)))
            np.testing.assert_array_equal(user.actor.read(where), user.seen.array[places])

    def keep_view(self, user):
        user.actor.keep_view()
        user.views = [*user.views[-2:], self.size(user)]

    def drop_views(self, user):
        user.actor.drop_views()
        user.views = []

    def append(self, user, n, value):
        size = self.size(user)
        if self.regions is DEEP and size + n > (ROOM if size <= ROOM else GAP + ROOM):
            return
        if self.regions is FLAT and size + n > 2 * ROOM:
            return
        data = (np.arange(n) + value).astype("<u2")
        user.actor.append(data)
        user.seen.append(data)

    def resize(self, user, size, upper):
        if self.regions is DEEP and upper:
            size += GAP
        if size != self.size(user):
            user.actor.resize(size)
            user.seen.resize(self.regions.model_size(size))

    def resize_and_back(self, user, size, upper, n, at, value, how):
        """With views of every size that are written to; then all of it is rolled back, or only the size is."""
        self.savepoint(user)
        self.keep_view(user)
        before = self.size(user)
        self.resize(user, size, upper)
        self.append(user, n, value)
        self.keep_view(user)
        for which, length in enumerate(user.views):
            for place in (at, length - 5):
                self.write_kept(user, which, self.where(place, 3000, 1, length), value)
        if how == "size" and before != self.size(user):
            user.actor.resize(before)
            user.seen.resize(self.regions.model_size(before))
        if how == "twice":
            self.savepoint(user)
            self.write_kept(user, 0, self.where(at, 1, 1, user.views[0]), value)
        if how != "size":
            self.back_to(user, len(user.savepoints) - (2 if how == "twice" else 1))

    def write_kept(self, user, which, where, value):
        if where is not None:
            user.actor.write_by_kept_view(which, where, value)
            places = np.arange(where.start, where.stop)
            self.expect(user, places, np.full(len(places), value, "<u2"))

    # -- transactions

    def commit(self, user):
        changes = self.changes[user.seen.version - self.first :]
        self.finish(user, user.seen.conflicts(changes, self.clients.merges))

    def finish(self, user, expected):
        """Commit; a conflict is expected (True), is not (False), or may come (None)."""
        note = f"version {self.version + 1}"
        conflict = not user.actor.commit(note)
        assert expected is None or conflict == expected
        if user.seen.changed and not conflict:
            after, hidden = user.seen.merged(self.committed), user.seen.beyond(self.committed)
            if user.seen.resized:
                self.uncover(after, self.changes[user.seen.version - self.first :])
            self.learn(after, resized=user.seen.resized, note=note, hidden=hidden)
        self.begin_all(user)

    def uncover(self, after, changes):
        """What `changes` wrote beyond the end shows, if the array has been made longer beside them."""
        hidden = {place: value for change in changes for place, value in change.hidden.items()}
        places = np.array([place for place in hidden if place < len(after.array)], int)
        if len(places):
            with contextlib.closing(Actor(self.clients.db)) as fresh:
                now = fresh.read(self.regions.places(places))
            kept = np.array([hidden[place] for place in places.tolist()])
            assert np.all((now == kept) | (now == after.array[places]))
            after.array[places] = now

    def learn(self, after, **what):
        """Something was committed."""
        self.changes.append(Change(self.committed, after, **what))
        self.version += 1
        self.committed = after
        sync(self.clients.db)
        self.past = [*self.past[1 - REMEMBERED :], (self.clients.db.lastTransaction(), after.parts(self.regions))]

    def begin_all(self, user):
        user.actor.begin()
        user.boundary(self)

    def begin(self, user, abort, savepoint=False):
        if abort:
            user.actor.abort()
        self.begin_all(user)
        if savepoint:  # before the array is used
            self.savepoint(user)

    def savepoint(self, user):
        user.actor.savepoint()
        user.savepoints = [*user.savepoints[1 - SAVEPOINTS :], user.seen.state()]

    def rollback(self, user, which):
        if user.savepoints:
            self.back_to(user, which % len(user.savepoints))

    def back_to(self, user, which):
        user.actor.rollback(which)
        user.seen.restore(user.savepoints[which])
        del user.savepoints[which + 1 :]

    # -- the past

    def undo(self, _, back):
        if not self.undoes or not self.changes:
            return
        back = min(back, len(self.changes))
        change = self.changes[-back]
        ids = [
            t["id"]
            for t in self.clients.db.undoInfo(0, 1000)
            if t["description"] in (change.note, change.note.encode())
        ]
        if not ids:
            assert not len(change.where)  # it changed something and changed it back: nothing was stored
            return
        after, doubtful, may_fail = undo(self.committed, self.changes, len(self.changes) - back)
        manager = transaction.TransactionManager()
        note = f"version {self.version + 1}"
        manager.begin().note(note)
        self.clients.db.undo(ids[0], manager.get())
        try:
            manager.commit()
        except UndoError:
            manager.abort()
            assert may_fail
            return
        if len(doubtful):
            with contextlib.closing(Actor(self.clients.db)) as fresh:
                now = fresh.read(self.regions.places(doubtful))
            before = sized(self.committed.array, len(after.array))[doubtful]
            hidden = doubtful >= len(self.committed.array)
            assert np.all((now == after.array[doubtful]) | (now == before) | hidden)
            after.array[doubtful] = now
        self.learn(after, resized=change.resized, note=note, undone=change)

    def look_back(self, _, which):
        """Open an old version; the next steps shall not change what it shows."""
        for old in self.kept:
            old.close()
        tid, parts = self.past[which % len(self.past)]
        self.kept = [Historical(self.clients.db, tid, parts)]

    def pack(self, _):
        """As ZODB is: whoever reads at an older snapshot may find it packed away."""
        if self.packs and all(user.seen.version == self.version for user in self.users):
            for old in self.kept:
                old.close()
            self.kept = []
            self.clients.db.pack()
            self.past = self.past[-1:]
            self.first, self.changes = self.version, []

    # -- connections

    def disturb(self, user, how):
        getattr(user.actor, how)()

    def reopen(self, user):
        """The pool hands out the same connection again, or another."""
        if user.seen.mask().any() or user.seen.counted():
            assert user.actor.close_is_refused()
        user.actor.close()
        user.actor.open()
        user.boundary(self)
        user.views = []

    # -- what must hold

    @invariant()
    def everybody_sees_what_they_should(self):
        for user in getattr(self, "users", ()):
            shape, counters, shown = user.actor.see(self.regions.parts)
            expected_shape, _, expected = Snapshot(user.seen.array, ()).parts(self.regions)
            assert shape == expected_shape
            assert counters == user.seen.counters
            for view, size in zip(shown, [shape[0], *user.views], strict=True):
                for got, want, (lo, _) in zip(view, expected, self.regions.parts, strict=True):
                    np.testing.assert_array_equal(got, want[: max(size - lo, 0)])
        for old in getattr(self, "kept", ()):
            old.compare(self.regions.parts)

    def teardown(self):
        if not hasattr(self, "users"):
            return
        for user in self.users:
            user.actor.close()
        for old in self.kept:
            old.close()
        with contextlib.closing(Actor(self.clients.db)) as fresh:
            shape, counters, shown = fresh.see(self.regions.parts)
        expected_shape, expected_counters, expected = self.committed.parts(self.regions)
        assert (shape, counters) == (expected_shape, expected_counters)
        for got, want in zip(shown[0], expected, strict=True):
            np.testing.assert_array_equal(got, want)
        gc.collect()  # the blobs of a commit that failed die as a cycle, and their files with them
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

    undoes = packs = True


class BloblessMachine(Machine):
    kind = "blobless"
    undoes = packs = True


class MappingMachine(Machine):
    kind = "mapping"


class DemoMachine(Machine):
    kind = "demo"


class DeepMachine(Machine):
    """With a node above the leaves, and changes at the border of two leaves."""

    regions = DEEP
    count = 2
    undoes = packs = True


class ZEOMachine(Machine):
    kind = "zeo"
    undoes = packs = True


class ZEOCacheMachine(ZEOMachine):
    kind = "zeo-cache"


class ProcessMachine(ZEOMachine):
    """One of the connections is in a process of its own."""


class ProcessCacheMachine(ZEOCacheMachine):
    """The same, with caches of blobs."""


MACHINES = [
    FileStorageMachine,
    BloblessMachine,
    MappingMachine,
    DemoMachine,
    DeepMachine,
    ZEOMachine,
    ZEOCacheMachine,
    ProcessMachine,
    ProcessCacheMachine,
]


def run(machine, request, options):
    from hypothesis.stateful import run_state_machine_as_test

    machine.servers = request
    with contextlib.ExitStack() as stack:
        if machine in (ProcessMachine, ProcessCacheMachine):
            uri = request.getfixturevalue("zeo_server" if machine.kind == "zeo" else "zeo_cache_server")
            machine.remote = stack.enter_context(contextlib.closing(RemoteActors(uri)))
        run_state_machine_as_test(machine, settings=options)


@pytest.mark.parametrize("machine", MACHINES)
def test_machine(machine, request):
    run(machine, request, settings(QUICK, max_examples=4) if machine is DeepMachine else QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_long_machine(machine, request):
    run(machine, request, LONG)


def test_elements_are_of_two_bytes():
    assert dz.ZBigArray(1, "<u2").granule == 2
