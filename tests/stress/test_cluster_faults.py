"""Whatever dies, wherever it is: a cluster's save is there as a whole or not at all, once, and leaves nothing behind.

Each run is one save of four arrays by real processes: a server, a client, two Dask workers, over a network that can
fail; `tests.faults` says what can happen, `tests.faultsite` what is checked after it. Readers look at every snapshot.

By default some of the most telling faults are tried. The marker ``stress`` runs the whole matrix, and
ZBIG_FAULT_RUNS (15) runs with faults at random.
"""

from __future__ import annotations

import itertools
import os

import pytest
from ZODB.blob import Blob

from tests import saver  # isort: skip
from tests.faults import Fault, a_run  # isort: skip
from tests.faultsite import Site  # isort: skip
from tests.proxy import Trouble  # isort: skip
from tests.steps import CLIENT, SERVER, WORKER  # isort: skip

RUNS = int(os.environ.get("ZBIG_FAULT_RUNS", "15"))
BEGUN = "client has begun"
PUBLISHED = "client has published"  # in its transaction, which is yet to be committed


class Sites:
    """One for all tests, until one fails."""

    def __init__(self):
        self._site = None

    def get(self):
        if self._site is not None and self._site.broken:
            self.close()
        if self._site is None:
            self._site = Site().__enter__()
        return self._site

    def close(self):
        site, self._site = self._site, None
        if site is not None:
            site.__exit__(None, None, None)


@pytest.fixture(scope="module")
def sites():
    sites = Sites()
    yield sites
    sites.close()


@pytest.fixture
def site(sites):
    return sites.get()


# -- that what must not be would be found


def test_a_broken_version_and_what_is_left_are_found(site):
    site.run()
    with site.db.transaction() as connection:
        root = connection.root()
        seen = saver.seen(root)
        array = root["A"]
        array[5] += 1
        with pytest.raises(AssertionError, match="A has 1 wrong"):
            saver.seen(root)
        array[5] -= 1
        root["L"].append([[seen, 0]])
        with pytest.raises(AssertionError, match="L has"):
            saver.seen(root)
        root["L"].resize((seen, 2))
        root["left"] = Blob(b"data")
    with pytest.raises(AssertionError, match="of no array"):
        site.check_nothing_left()
    with site.db.transaction() as connection:
        del connection.root()["left"]
    site.check_nothing_left()
    left = os.path.join(site.db.storage.fshelper.temp_dir, "left")
    with open(left, "wb"):
        pass
    with pytest.raises(AssertionError, match="left"):
        site.check_nothing_left()
    os.unlink(left)


# -- one fault at a time


def of_workers():
    for step in WORKER:
        yield Fault(step)
        yield Fault(step, "server dies")
    for step in ("worker has written", "worker votes", "worker has voted"):
        yield Fault(step, "cut")
    yield Fault("worker has written", "server starts again")
    yield Fault("worker stages", "again")
    for step in ("worker has voted", "worker has finished", "worker has staged"):
        yield Fault(step, "both die")
    yield Fault("worker has staged", "pack", 3)
    for what in ("lose", "halve", "unanswer", "belate"):
        yield Fault("worker has written", "trouble", trouble=Trouble(what, b"tpc_finish"))
    yield Fault("worker has written", "trouble", trouble=Trouble("halve", b"storeBlob"))
    yield Fault("worker has voted", "trouble", trouble=Trouble("halve", b".reply", to_server=False))


def of_the_client():
    yield Fault("client begins", "server dies")
    for step in CLIENT[2:]:  # (between begin and that it is the user who loads arrays)
        yield Fault(step, "server dies", after=BEGUN)
    yield Fault("client votes", "server dies")
    yield Fault("client has voted", "server dies")
    for step in SERVER:
        yield Fault(step, after=BEGUN)
        yield Fault(step, after=PUBLISHED)
    for step in ("client has voted", "server has voted", "server has finished"):
        yield Fault(step, "cut", after=PUBLISHED)
    for step in ("client stages", "client has staged", PUBLISHED):
        yield Fault(step, "pack")
        yield Fault(step, "hold")
    yield Fault("client publishes", "server starts again")
    yield Fault("client hears of a chunk", "worker dies", 3)
    for word, what in itertools.product((b"vote", b"tpc_finish"), ("lose", "halve", "unanswer", "belate")):
        yield Fault(PUBLISHED, "trouble", trouble=Trouble(what, word))
    for what in ("lose", "halve", "delay"):
        yield Fault(PUBLISHED, "trouble", trouble=Trouble(what, b"storea"))
        yield Fault("client has voted", "trouble", after=PUBLISHED, trouble=Trouble(what, b".reply", to_server=False))


def to_the_client():
    for step in CLIENT:
        yield Fault(step)
    for step in ("client has staged", "client has voted", "client has finished"):
        yield Fault(step, "both die", after="client stages")


SAMPLE = [
    Fault("worker has written"),
    Fault("worker has staged"),
    Fault("worker stages", "again"),
    Fault("client has staged", "server dies"),
    Fault("server has finished", after=PUBLISHED),
    Fault(PUBLISHED, "hold"),
    Fault(PUBLISHED, "trouble", trouble=Trouble("unanswer", b"tpc_finish")),
    Fault(PUBLISHED, "trouble", trouble=Trouble("belate", b"tpc_finish")),
]


def named(faults, *marks):
    for n, fault in enumerate(faults):
        words = [fault.step, fault.action if fault.trouble is None else f"{fault.trouble.what} {fault.trouble.word!r}"]
        if fault.after:
            words.append(f"after {fault.after}")
        yield pytest.param(fault, n % 3 != 2, id=", ".join(words).replace(" ", "-"), marks=marks)


@pytest.mark.parametrize(
    ("fault", "shared"), [*named(SAMPLE), *named([*of_workers(), *of_the_client()], pytest.mark.stress)]
)
def test_the_client_saves_although(site, fault, shared):
    """Nothing that happens to others makes the client say that it could not."""
    said, happened = site.run([fault], shared=shared)
    assert fault in happened
    assert all(s["saved"] for s in said), said


@pytest.mark.parametrize(
    ("fault", "shared"),
    [*named([Fault("client has voted", after=PUBLISHED)]), *named(to_the_client(), pytest.mark.stress)],
)
def test_a_client_dies(site, fault, shared):
    said, happened = site.run([fault], shared=shared)
    assert fault in happened
    assert said[0] is None


@pytest.mark.stress
@pytest.mark.parametrize(("how", "shared"), [("transaction", True), ("delayed", False)])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(PUBLISHED),
        Fault("client has voted", "both die", after=PUBLISHED),
        Fault("server has finished", after=PUBLISHED),
        Fault(PUBLISHED, "hold"),
        Fault("worker has finished"),
    ],
    ids=lambda fault: f"{fault.step}, {fault.action}".replace(" ", "-"),
)
def test_other_ways_to_save(site, fault, shared, how):
    _, happened = site.run([fault], shared=shared, how=how)
    assert fault in happened


# -- any number of faults


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(RUNS))
def test_faults_at_random(site, seed):
    site.run(**a_run(seed))


# -- two clients


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.stress)])
def test_two_clients_save_disjoint_parts_at_once(site, times):
    half = saver.COMMON // 2
    for k in range(times):
        cut = half + k  # never twice in the same place
        said, rows = site.at_once((k % 2, 0, cut, k + 1.0), (k % 2, cut, saver.COMMON, -k - 1.0))
        assert [s["saved"] for s in said] == [True, True], said
        assert (rows[k % 2, :cut] == k + 1).all()
        assert (rows[k % 2, cut:] == -k - 1).all()
    site.check_nothing_left()


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.stress)])
def test_of_two_clients_that_save_overlapping_parts_at_once_one_does(site, times):
    half = saver.COMMON // 2
    for k in range(times):
        # (values that no other test leaves there)
        one, two = (0, 0, half + 1 + k, 2 * k + 1001.0), (0, half - k, saver.COMMON, 2 * k + 1002.0)
        said, rows = site.at_once(one, two)
        assert sorted(s["saved"] for s in said) == [False, True], said
        winner, loser = (one, two) if said[0]["saved"] else (two, one)
        assert next(s["error"] for s in said if not s["saved"]) == "SaveConflictError", said
        assert (rows[0, winner[1] : winner[2]] == winner[3]).all()
        assert not (rows[0] == loser[3]).any()
    site.check_nothing_left()


# -- the readers


def test_what_readers_saw(site):
    """All that was saved until now by the tests above, each version as a whole."""
    site.run()
    site.look()
    for seen in site.end_readers():
        assert seen["looks"] > 10
        assert site.version in seen["versions"]
    site.broken = True  # without readers it is of no more use
