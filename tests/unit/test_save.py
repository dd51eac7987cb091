"""Saves beyond the simple case: appended, staged now and published later, repeated, in conflict, retried, watched."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import tempfile

import dask
import dask.array as da
import numpy as np
import pytest
import transaction
from ZEO.Exceptions import ClientDisconnected
from ZODB.POSException import ConflictError, POSError

import dask_zbig as dz
from dask_zbig import database
from dask_zbig.cluster import coordinator, store
from dask_zbig.cluster.memory import charged
from dask_zbig.cluster.staging import ROOT_KEY, collect
from dask_zbig.memory._native import PAGE
from dask_zbig.storage import extents as ex

from tests.proxy import Proxy, Trouble  # isort: skip


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads"):
        yield


@pytest.fixture
def pair(clients):
    """Two clients, and an array of zeros, (100, 30), as each sees it."""
    clients.new((100, 30), "f8")
    one, A, two, B = clients.pair()
    yield one, A, two, B
    assert jobs(clients) == []


def jobs(clients):
    client = clients.connect(other=True)
    client.begin()
    found = list(client.root.get(ROOT_KEY, ()))
    client.close()
    return found


def fresh(clients):
    client = clients.connect(other=True)
    client.begin()
    return client.root["A"]


values = np.arange(3000.0).reshape(100, 30)
x = da.from_array(values, chunks=(17, 30))


# -- append


@pytest.mark.parametrize("order", "CF")
def test_append(clients, order):
    shape = (30, 100) if order == "F" else (100, 30)
    clients.new((30, 0) if order == "F" else (0, 30), "f4", order)
    client = clients.connect()
    A = client.root["A"]
    y = x.T if order == "F" else x
    result = dz.to_zbigarray(y, A, append=True)
    assert (A.shape, result.bytes) == (shape, 12000)
    client.commit()
    with dz.CommitCoordinator(client.connection) as save:
        save.append(y[..., :20] if order == "F" else y[:20], A)
        save.append(y, A)
        assert A.shape == shape  # until it is saved
    axis = 1 if order == "F" else 0
    data = values.T if order == "F" else values
    expected = np.concatenate([data, np.take(data, range(20), axis), data], axis)
    np.testing.assert_array_equal(fresh(clients), expected)
    np.testing.assert_array_equal(A, expected)
    for bad in (y[0], y[:, :5] if order == "C" else y[:5]):
        with pytest.raises(dz.ShapeError, match="cannot append"):
            dz.to_zbigarray(bad, A, append=True)
    with pytest.raises(dz.ShapeError, match="no region"):
        dz.to_zbigarray(y, A, np.s_[:100], append=True)
    client.abort()
    assert jobs(clients) == []


def test_appends_at_the_same_time_are_repeated_until_both_are_done(pair, clients):
    one, A, two, B = pair
    with dz.CommitCoordinator(two.connection) as late:
        late.append(x, B)
        A.append(values[:7])
        one.commit()
    assert late.result.retries == 1
    assert B.shape == (207, 30)
    np.testing.assert_array_equal(fresh(clients)[100:], np.concatenate([values[:7], values]))


# -- staged now, published later


def test_compute_false(pair, clients):
    one, A, two, B = pair
    later = dz.to_zbigarray(x, A, compute=False)
    A[0, 0] = 5  # the array may change meanwhile
    one.commit()
    (staged,) = dask.compute(later)
    staged = pickle.loads(pickle.dumps(staged))
    assert (staged.bytes, staged.segments) == (24000, 6)
    assert not fresh(clients)[1:].any()
    two.begin()
    staged.publish(B)  # by whoever has got it
    np.testing.assert_array_equal(B, values)
    two.abort()
    assert not B[1:].any()
    staged.publish(B)
    two.commit()
    np.testing.assert_array_equal(fresh(clients), values)
    one.begin()
    with pytest.raises(dz.PublishError, match="has been published"):
        staged.publish(A)
    staged.discard()
    with pytest.raises(dz.PublishError, match=r"gone|published"):
        staged.publish(A)
    one.abort()


def test_an_append_that_is_published_later_goes_to_the_end_of_that_time(pair, clients):
    one, A, _, _ = pair
    staged = dz.to_zbigarray(x, A, append=True, compute=False).compute()
    A.append(values[:3])
    staged.publish(A)
    one.commit()
    np.testing.assert_array_equal(fresh(clients)[100:], np.concatenate([values[:3], values]))
    staged.discard()


def test_publishing_into_the_wrong_array(pair, clients):
    one, A, _, _ = pair
    one.root["C"] = C = dz.ZBigArray((100, 30))
    one.commit()
    staged = dz.to_zbigarray(x, A, compute=False).compute()
    with pytest.raises(dz.PublishError, match="not the array"):
        staged.publish(C)
    A.resize((150, 20))
    with pytest.raises(dz.ShapeError, match="another shape"):
        staged.publish(A)
    A.resize((50, 30))
    with pytest.raises(dz.ZBigError):
        staged.publish(A)
    one.abort()
    assert not A[...].any()
    staged.discard()


def test_a_job_that_is_gone(pair):
    one, A, _, _ = pair
    staged = dz.to_zbigarray(x, A, compute=False).compute()
    collect(database.location(one.connection.db()), now=1e12)
    with pytest.raises(dz.PublishError, match="gone"):
        staged.publish(A)
    one.abort()


# -- once


def test_a_job_of_a_name_is_saved_once(pair, clients):
    one, A, two, B = pair
    count = []
    y = x.map_blocks(lambda b: count.append(1) or b, dtype="f8", meta=np.empty((0, 0)))
    for expected in (6, 6):
        dz.to_zbigarray(y, A, append=True, job_id="monday")
        one.commit()
        assert (A.shape, len(count)) == ((200, 30), expected)
    two.begin()
    with dz.CommitCoordinator(two.connection, job_id="monday") as save:
        save.append(y, B)
    assert (save.result.job_id, save.result.tid, save.result.bytes) == ("monday", None, 0)
    assert (B.shape, len(count)) == ((200, 30), 6)
    with dz.CommitCoordinator(two.connection, job_id="tuesday") as save:
        save.append(y, B)
    assert (B.shape, len(count)) == ((300, 30), 12)
    # two at a time: only one of them is
    one.begin()
    two.begin()
    dz.to_zbigarray(x, A, np.s_[:100], job_id="wednesday")
    dz.to_zbigarray(x, B, np.s_[100:200], job_id="wednesday")
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()


# -- conflicts


def test_a_conflict_names_array_and_elements_and_can_be_retried(pair, clients):
    one, A, two, B = pair
    A[:] = 1
    one.commit()
    two.begin()
    count = []
    y = x.map_blocks(lambda b: count.append(1) or b, dtype="f8", meta=np.empty((0, 0)))
    with pytest.raises(dz.SaveConflictError) as info, dz.CommitCoordinator(two.connection) as save:  # noqa: PT012
        save.store(y[20:40], B, region=np.s_[20:40])
        A[30, 5:7] = 4
        A[50] = 4
        one.commit()
    assert isinstance(info.value, ConflictError)
    assert info.value.array is B
    assert info.value.ranges == [((30 * 30 + 5) * 8, (30 * 30 + 7) * 8)]
    assert "from [30, 5] to [30, 6]" in str(info.value)
    assert save.result is None
    assert not save.published()
    assert B[30, 5] == 4  # theirs, meanwhile
    computed = len(count)
    result = save.retry()
    assert len(count) == computed
    assert result is save.result
    expected = np.ones((100, 30))
    expected[50] = 4
    expected[20:40] = values[20:40]
    np.testing.assert_array_equal(fresh(clients), expected)
    with pytest.raises(dz.PublishError, match="nothing staged"):
        save.retry()


def test_disjoint_saves_never_conflict(pair, clients):
    """Also where the storage merges nothing, and where both make the same part of the extent map."""
    one, _, two, _ = pair
    far = 5 << 30  # beyond what is made ahead
    one.root["far"] = dz.ZBigArray(far, "u1")
    one.commit()
    two.begin()
    with dz.CommitCoordinator(two.connection) as late:
        late.store(da.ones(1000, dtype="u1", chunks=300), two.root["far"], region=np.s_[far - 1000 :])
        with dz.CommitCoordinator(one.connection) as early:
            early.store(da.ones(1000, dtype="u1", chunks=300), one.root["far"], region=np.s_[far - 2000 : far - 1000])
    assert late.result.retries == 1
    one.begin()
    assert one.root["far"][far - 2000 :].all()


def test_with_other_changes_in_the_transaction_nothing_is_repeated(pair, clients):
    one, A, two, B = pair
    two.root["other"] = 1
    with pytest.raises(ConflictError), dz.CommitCoordinator(two.connection) as save:  # noqa: PT012
        save.append(x, B)
        A.append(values[:1])
        one.commit()
    assert "other" not in two.root
    two.root["other"] = 2
    save.retry()
    one.begin()
    assert (A.shape, one.root["other"]) == ((201, 30), 2)


def test_a_conflict_that_is_given_up(pair, clients):
    one, A, two, B = pair
    with pytest.raises(dz.SaveConflictError), dz.CommitCoordinator(two.connection) as save:  # noqa: PT012
        save.store(x, B)
        A[0, 1] = 4
        one.commit()
    save.discard()
    assert fresh(clients)[...].sum() == 4
    assert not save.published()
    with pytest.raises(dz.PublishError, match="nothing staged"):
        save.retry()


# -- answers that get lost


class Lost(POSError):
    """As when a server goes away."""


@pytest.mark.parametrize("done", [True, False], ids=["after the commit", "before it"])
def test_a_commit_whose_answer_is_lost_asks_the_ledger(pair, clients, monkeypatch, done):
    one, A, _, _ = pair
    commit = one.tm.commit

    def lose():
        if done:
            commit()
        raise Lost("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(one.tm, "commit", lose)
        save = dz.CommitCoordinator(one.connection)
        if done:
            with save:
                save.store(x, A)
        else:
            with pytest.raises(Lost), save:
                save.store(x, A)
            assert not save.published()
    if not done:
        save.retry()
    assert save.published()
    np.testing.assert_array_equal(fresh(clients), values)


def test_when_nobody_can_be_asked_the_outcome_is_unknown(pair, clients, monkeypatch):
    one, A, _, _ = pair
    commit = one.tm.commit

    def lose():
        commit()
        raise Lost("connection lost")

    def gone(db):
        raise dz.DatabaseUnavailableError("the server does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(one.tm, "commit", lose)
        patch.setattr(coordinator.database, "sync", gone)
        with pytest.raises(dz.OutcomeUnknownError, match="published"), dz.CommitCoordinator(one.connection) as save:
            save.store(x, A)
        with pytest.raises(dz.DatabaseUnavailableError):
            save.published()
    assert len(jobs(clients)) == 1  # nothing is deleted
    assert save.published()
    assert save.retry().tid is None  # it was saved before
    np.testing.assert_array_equal(fresh(clients), values)


# -- in a transaction of the user's


def test_with_savepoints(pair, clients):
    one, A, _, _ = pair
    A[0] = 9
    before = one.savepoint()
    dz.to_zbigarray(x[50:], A, np.s_[50:])
    after = one.savepoint()
    A[60] = -1
    after.rollback()
    np.testing.assert_array_equal(A[50:], values[50:])
    before.rollback()
    assert not A[1:].any()
    dz.to_zbigarray(x[:50], A, np.s_[:50])
    one.root["note"] = "with it"
    one.commit()
    A = fresh(clients)
    np.testing.assert_array_equal(A[:50], values[:50])
    assert not A[50:].any()


# -- reading what was stored


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("step", [1, -1, 3])
def test_return_stored(clients, order, step):
    clients.new((100, 30), "f4", order)
    client = clients.connect()
    y = x.rechunk((40, 11))[::step]
    stored = dz.to_zbigarray(y, client.root["A"], np.s_[33::-1] if step == 3 else np.s_[:], return_stored=True)
    assert (stored.chunks, stored.dtype) == (y.chunks, np.dtype("f4"))
    assert not fresh(clients)[...].any()
    np.testing.assert_array_equal(stored.compute(), values[::step].astype("f4"))
    np.testing.assert_array_equal(stored[5:9, ::2].compute(), values[::step][5:9, ::2])
    client.commit()
    np.testing.assert_array_equal(stored.compute(), values[::step].astype("f4"))
    with pytest.raises(ValueError, match="compute=True"):
        dz.to_zbigarray(y, client.root["A"], return_stored=True, compute=False)


# -- progress


def test_progress(pair):
    one, A, _, _ = pair
    seen = []
    with dz.CommitCoordinator(one.connection) as save:
        save.progress.append(seen.append)
        save.store(x, A)
        save.append(x[:5], A)
    assert [s.chunks for s in seen] == list(range(1, 8))
    assert {s.total for s in seen} == {7}
    assert seen[-1].bytes == save.result.bytes == 24000 + 5 * 240


# -- rechunking


def test_chunks_that_lie_in_short_pieces_are_cut_anew(local):
    local.new((4000, 700), "f8")
    client = local.connect()
    A = client.root["A"]
    data = np.random.default_rng(0).random((4000, 700))  # segments of 2.2 MB: smaller ones would be joined
    columns = da.from_array(data, chunks=(4000, 70))
    for rechunk, segments in [("auto", 10), (True, 10), (False, 10)]:
        result = dz.to_zbigarray(columns, A, rechunk=rechunk)
        assert result.segments == segments
        np.testing.assert_array_equal(A, data)
        client.commit()
        extents = sum(len(leaf.extents) for _, leaf in A._file.leaves(0, A.nbytes))
        assert extents == (40_000 if rechunk is False else 10)
    rows = da.from_array(data, chunks=(400, 700))  # nothing to gain
    assert dz.to_zbigarray(rows, A).segments == 10
    client.abort()


def test_what_is_appended_out_of_alignment_reads_right(local):
    """After a repeated append the bytes lie at another offset in their page than in the segment."""
    local.new(1001, "u1")
    client = local.connect()
    A = client.root["A"]
    data = np.random.default_rng(1).integers(0, 255, 5 * PAGE + 3, "u1")
    staged = dz.to_zbigarray(da.from_array(data, chunks=2 * PAGE), A, append=True, compute=False).compute()
    A.append(np.ones(77, "u1"))
    staged.publish(A)
    client.commit()
    np.testing.assert_array_equal(fresh(local)[1078:], data)
    staged.discard()


def test_nothing_is_left(pair, clients):
    one, A, _, _ = pair
    with dz.CommitCoordinator(one.connection) as save:
        save.store(x, A)
    assert save.result.tid
    if clients.blobs:
        directory = one.connection._normal_storage.temporaryDirectory()
        assert [n for n in os.listdir(directory) if n.startswith("zbig-stage")] == []


@pytest.mark.slow
def test_publishing_a_terabyte_takes_little_memory(local):
    """16,384 segments of 64 MiB, which only exist on paper: publishing looks at manifests alone."""
    count, size = 16_384, 64 << 20
    local.new(count * size // 8, "f8")
    client = local.connect()
    A = client.root["A"]
    later = dz.to_zbigarray(da.zeros(8, chunks=8), A, np.s_[:8], compute=False)
    staged = later.compute()
    (segment,) = staged.manifests[0].segments
    manifests = tuple(
        dataclasses.replace(
            staged.manifests[0],
            extents=ex.make([(i * size, (i + 1) * size, 0, 0)]).tobytes(),
            segments=(dataclasses.replace(segment, oid=(i + (1 << 40)).to_bytes(8, "big"), length=size, inline=False),),
        )
        for i in range(count)
    )
    before = charged(os.getpid())
    dataclasses.replace(staged, manifests=manifests).publish(A)
    assert charged(os.getpid()) - before < 200 << 20
    client.commit()
    assert charged(os.getpid()) - before < 200 << 20
    assert sum(1 for _ in A._file.leaves(0, A.nbytes)) == count
    staged.discard()


# -- connections that get lost (found by tests/stress/test_cluster_faults.py)


def disconnect(monkeypatch, owner, name, *, done, times=1):
    """Let the first calls lose the connection: after they have `done` their work, or before. Returns who was called."""
    original, calls = getattr(owner, name), []

    def lose(*args, **options):
        calls.append(args)
        if len(calls) > times:
            return original(*args, **options)
        if done:
            original(*args, **options)
        raise ClientDisconnected("connection lost")

    monkeypatch.setattr(owner, name, lose)
    return calls


@pytest.mark.parametrize("done", [True, False], ids=["after the commit", "before it"])
@pytest.mark.parametrize("size", [30, 3000], ids=["inline", "blob"])
def test_staging_goes_on_when_the_connection_was_lost(clients, monkeypatch, done, size):
    clients.new((100, size), "f8")
    client = clients.connect()
    y = da.from_array(np.arange(100.0 * size).reshape(100, size), chunks=(50, size))
    calls = disconnect(monkeypatch, store, "commit_entry", done=done)
    with dz.CommitCoordinator(client.connection) as save:
        save.store(y, client.root["A"])
    assert len(calls) == 3
    np.testing.assert_array_equal(fresh(clients), y)
    assert jobs(clients) == []
    assert clients.scratch() == []


def test_staging_goes_on_when_the_connection_was_lost_as_it_was_made(pair, clients, monkeypatch):
    one, A, _, _ = pair

    def lose(location):
        monkeypatch.undo()
        raise dz.DatabaseUnavailableError("no ZEO server answers") from ClientDisconnected("connection lost")

    monkeypatch.setattr(store, "blob_directory", lose)
    with dz.CommitCoordinator(one.connection) as save:
        save.store(x, A)
    np.testing.assert_array_equal(fresh(clients), values)


def test_staging_gives_up_in_the_end(pair, monkeypatch):
    one, A, _, _ = pair
    disconnect(monkeypatch, store, "commit_entry", done=False, times=10**9)
    with (
        dask.config.set({"zbig.zeo.wait-timeout": 0.1}),
        pytest.raises(ClientDisconnected),
        dz.CommitCoordinator(one.connection) as save,
    ):
        save.store(x, A)


@pytest.mark.parametrize("done", [True, False], ids=["after the commit", "before it"])
@pytest.mark.parametrize("append", [True, False])
def test_publishing_goes_on_when_the_connection_was_lost(pair, clients, monkeypatch, done, append):
    one, A, _, _ = pair
    calls = disconnect(monkeypatch, one.tm, "commit", done=done)
    with dz.CommitCoordinator(one.connection) as save:
        (save.append if append else save.store)(x, A)
    assert len(calls) == (1 if done else 2)
    assert save.result.retries == (0 if done else 1)
    np.testing.assert_array_equal(fresh(clients)[-100:], values)
    assert len(A) == (200 if append else 100)
    assert A._file.journal._p_serial == save.result.tid


@pytest.mark.parametrize("name", ["commit", "begin"])
def test_what_others_changed_while_the_connection_was_lost_is_a_conflict(pair, clients, monkeypatch, name):
    """Else publishing again would silently overwrite it."""
    one, A, two, B = pair
    A[:] = 1
    one.commit()
    two.begin()
    original = getattr(two.tm, name)

    def lose():
        monkeypatch.undo()
        one.begin()
        A[30] = 4
        one.commit()
        if name == "commit":
            raise ClientDisconnected("connection lost")
        return original()

    save = dz.CommitCoordinator(two.connection)
    with pytest.raises(dz.SaveConflictError, match="from \\[30, 0\\] to"), save:  # noqa: PT012
        save.store(x[:50], B, region=np.s_[:50])
        monkeypatch.setattr(two.tm, name, lose)
        if name == "begin":  # the one after a conflict in something else
            one.begin()
            A.append(values[:1])
            one.commit()
            save.append(x[:1], B)
    assert (fresh(clients)[30] == 4).all()
    assert save.retry().tid is not None
    np.testing.assert_array_equal(fresh(clients)[:50], values[:50])


def test_publishing_goes_on_when_a_load_has_failed_for_that(pair, clients, monkeypatch):
    one, A, _, _ = pair
    publish = coordinator.publish

    def fail(stores, connection):
        monkeypatch.undo()
        publish(stores, connection)
        raise dz.LoadError("cannot load") from ClientDisconnected("connection lost")

    monkeypatch.setattr(coordinator, "publish", fail)
    with dz.CommitCoordinator(one.connection) as save:
        save.append(x, A)
    assert save.result.retries == 1
    assert fresh(clients).shape == (200, 30)


def test_the_ledger_is_asked_until_it_answers(pair, clients, monkeypatch):
    one, A, _, _ = pair
    disconnect(monkeypatch, one.tm, "commit", done=True)
    asked = disconnect(monkeypatch, coordinator, "renew", done=False)
    with dz.CommitCoordinator(one.connection) as save:
        save.append(x, A)
    assert len(asked) == 2
    assert save.result.retries == 0
    assert fresh(clients).shape == (200, 30)


def test_with_other_changes_in_the_transaction_a_lost_commit_is_not_repeated(pair, monkeypatch):
    one, A, _, _ = pair
    one.root["other"] = 1
    with monkeypatch.context() as patch:
        disconnect(patch, one.tm, "commit", done=False)
        with pytest.raises(ClientDisconnected), dz.CommitCoordinator(one.connection) as save:
            save.append(x, A)
    assert "other" not in one.root
    one.root["other"] = 2
    save.retry()
    assert (A.shape, one.root["other"]) == ((200, 30), 2)


@pytest.mark.parametrize("alone", [True, False])
def test_the_same_job_saved_by_another_client_meanwhile(pair, clients, alone):
    """As when it was taken for dead, and run again."""
    one, A, two, B = pair

    def other(progress):
        if progress.chunks == 1:
            one.begin()
            with dz.CommitCoordinator(one.connection, job_id="monday") as early:
                early.append(x, A)
                one.root["by"] = 1

    with dz.CommitCoordinator(two.connection, job_id="monday") as late:
        late.progress.append(other)
        late.append(x, B)
        if not alone:
            two.root["by"] = 2
    assert (late.result.tid, late.result.bytes) == (None, 0)
    assert (B.shape, two.root["by"]) == ((200, 30), 1)
    assert fresh(clients).shape == (200, 30)


def test_a_save_that_was_done_before_leaves_nothing_in_the_transaction(pair):
    one, _, two, B = pair
    for client in (one, two):
        client.begin()
        with dz.CommitCoordinator(client.connection, job_id="monday") as save:
            save.append(x, client.root["A"])
            client.root["runs"] = client.root.get("runs", 0) + 1
    two.commit()
    assert (B.shape, two.root["runs"]) == ((200, 30), 1)
    one.begin()
    assert one.root["runs"] == 1


def test_a_commit_that_arrives_late(tmp_path):
    """The connection is lost, but not what was sent: the client may not say that it is not saved."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="t", dir="/tmp"))
        uri = stack.enter_context(dz.serve(tmp_path / "x.fs", address=os.path.join(place, "zeo")))
        network = stack.enter_context(contextlib.closing(Proxy(os.path.join(place, "zeo"))))
        network.listen(os.path.join(place, "proxy"))
        db = stack.enter_context(contextlib.closing(dz.open(uri.replace("/zeo?", "/proxy?"))))
        connection = db.open(transaction.TransactionManager())
        connection.root()["A"] = A = dz.ZBigArray((0, 30))
        connection.transaction_manager.commit()
        with dz.CommitCoordinator(connection) as save:
            connection.root()["other"] = 1  # so that it is not just repeated
            save.append(x, A)
            trouble = Trouble("belate", b"tpc_finish", seconds=0.5)
            save.progress.append(lambda progress: progress.chunks == 6 and network.expect(trouble))
        assert network.happened == [trouble]
        assert save.result.tid is not None
        assert (A.shape, connection.root()["other"]) == ((100, 30), 1)
        connection.close()


def test_an_array_that_has_become_smaller(pair, clients):
    one, A, _, _ = pair
    with pytest.raises(dz.ShapeError, match="smaller than when"), dz.CommitCoordinator(one.connection) as save:  # noqa: PT012
        save.append(x, A)
        save.store(x, A)
        A.resize(10, 30)
    save.discard()
    assert A.shape == (100, 30)


@pytest.mark.parametrize("job_id", [5, b"x", ""])
def test_job_ids_are_texts(pair, job_id):
    one, A, _, _ = pair
    with pytest.raises(TypeError, match="job_id"):
        dz.to_zbigarray(x, A, job_id=job_id)
    with pytest.raises(TypeError, match="job_id"):
        dz.CommitCoordinator(one.connection, job_id=job_id)


def test_what_was_saved_under_a_name_is_not_staged_again(pair):
    one, A, _, _ = pair
    dz.to_zbigarray(x, A, job_id="monday")
    one.commit()
    for options in ({"compute": False}, {"return_stored": True}):
        with pytest.raises(dz.PublishError, match="saved already"):
            dz.to_zbigarray(x, A, job_id="monday", **options)


def test_a_save_of_nothing_has_no_transaction(pair):
    one, _, _, _ = pair
    with dz.CommitCoordinator(one.connection) as save:
        pass
    assert save.result.tid is None


def test_a_conflict_names_what_was_changed_not_what_was_joined_with_it(pair):
    """Many small commits have the extent map's leaf compacted, which moves bytes but changes none."""
    one, A, two, B = pair
    for k in range(14):
        A[40 + k, 3] = 1
        one.commit()
    two.begin()
    with pytest.raises(dz.SaveConflictError) as info, dz.CommitCoordinator(two.connection) as save:  # noqa: PT012
        save.store(x, B)
        for k in range(3):
            A[60, 4 * k] = 2
            one.commit()
        before = len(A._file.leaf(0).refs)
    assert before < 14  # they were joined
    assert info.value.ranges == [((60 * 30 + 4 * k) * 8, (60 * 30 + 4 * k + 1) * 8) for k in range(3)]
    save.discard()
