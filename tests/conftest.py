"""What all tests share: a time limit for each, Hypothesis profiles, and databases of every kind."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import subprocess
import sys

import hypothesis
import pytest
import transaction
import ZODB
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage

import dask_zbig as dz

from tests.scratch import left  # isort: skip

SECONDS = 400  # a test that takes longer shows where it hangs, and ends the run
SECONDS_IF_SLOW = 3600

_CHECKS = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
_COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": _CHECKS}
hypothesis.settings.register_profile("quick", max_examples=100, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=5000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_configure(config):
    # now, while nothing is captured: what faulthandler writes must not go to a file that nobody will read
    config.zbig_stderr = os.dup(2)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background: children would ignore it, too
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _elsewhere(tmp_path_factory):
    """Run outside of the clone: a child's Python would find the source tree there, not what is installed."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(autouse=True)
def _hangs_are_shown(request):
    long = any(request.node.get_closest_marker(mark) for mark in ("slow", "stress", "crash"))
    faulthandler.dump_traceback_later(SECONDS_IF_SLOW if long else SECONDS, exit=True, file=request.config.zbig_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


# -- databases


class Clients:
    """A database, and connections to it that have a transaction manager each. All are closed at the end."""

    def __init__(self, kind, db, *, merges=True, blobs=True, more=None):
        self.kind = kind
        self.db = db
        self.merges = merges  # whether the storage resolves conflicts
        self.blobs = blobs
        self._more = more or (lambda: db)  # a database as another process would have it
        self._stack = contextlib.ExitStack()

    def database(self, *, other=False):
        """The database; `other`: by a storage client of its own, if this kind of storage has those."""
        return self._more() if other else self.db

    def connect(self, *, other=False):
        """A new Client of `database`."""
        return Client(self, self.database(other=other))

    def new(self, *args, name="A", **options):
        """Store a new array under root[name] and commit."""
        client = self.connect()
        client.root[name] = dz.ZBigArray(*args, **options)
        client.commit()
        client.close()

    def pair(self, name="A"):
        """The array of this name, in two clients."""
        one, two = self.connect(), self.connect(other=True)
        return one, one.root[name], two, two.root[name]

    def scratch(self):
        """The scratch files that exist now, and are not there to be gone on with."""
        if not self.blobs:
            return []
        with self.db.transaction() as connection:
            directory = connection._normal_storage.temporaryDirectory()
        others = [name for name in os.listdir(directory) if name.startswith(("BUC", "savepoint"))]
        return left(directory) + sorted(others)


class Client:
    """A connection with its transaction manager."""

    def __init__(self, owner, db):
        self.owner = owner
        self.tm = transaction.TransactionManager()
        self.connection = db.open(self.tm)
        owner._stack.callback(self.close)

    @property
    def root(self):
        return self.connection.root()

    def begin(self):
        """See what others committed. A client of a server first hears of it."""
        storage = self.connection.db().storage
        if hasattr(storage, "ping"):
            storage.ping()
        return self.tm.begin()

    def commit(self):
        self.tm.commit()

    def abort(self):
        self.tm.abort()

    def savepoint(self):
        return self.tm.savepoint()

    def close(self):
        if self.connection.opened is not None and self.connection.transaction_manager is self.tm:
            self.tm.abort()
            self.connection.close()


KINDS = ("filestorage", "blobless", "mapping", "zeo", "zeo-cache")


@pytest.fixture(scope="session")
def zeo_server(tmp_path_factory):
    """A server with a shared blob directory; returns its URI."""
    with dz.serve(str(tmp_path_factory.mktemp("zeo") / "x.fs")) as uri:
        yield uri


@pytest.fixture(scope="session")
def zeo_cache_server(tmp_path_factory):
    """A server whose clients keep a cache of blobs."""
    with dz.serve(str(tmp_path_factory.mktemp("zeo-cache") / "x.fs"), shared_blob_dir=False) as uri:
        yield uri


@contextlib.contextmanager
def open_clients(kind, directory, request):
    with contextlib.ExitStack() as stack:

        def opened(db):
            stack.callback(db.close)
            return db

        if kind == "filestorage":
            clients = Clients(kind, opened(dz.open(os.path.join(directory, "x.fs"))))
        elif kind == "blobless":
            clients = Clients(kind, opened(ZODB.DB(FileStorage(os.path.join(directory, "x.fs")))), blobs=False)
        elif kind == "mapping":
            clients = Clients(kind, opened(ZODB.DB(MappingStorage())), merges=False, blobs=False)
        elif kind == "demo":  # changes in memory, over whatever was stored there by "filestorage"
            path = os.path.join(directory, "x.fs")
            dz.open(path).close()
            base = FileStorage(path, read_only=True, blob_dir=path + ".blobs")
            clients = Clients(kind, opened(ZODB.DB(DemoStorage(base=base))))
        else:
            uri = request.getfixturevalue("zeo_server" if kind == "zeo" else "zeo_cache_server")
            clients = Clients(kind, opened(dz.open(uri)), more=lambda: opened(dz.open(uri)))
            with clients.db.transaction() as connection:
                connection.root().clear()
        stack.enter_context(clients._stack)  # (connections before databases)
        yield clients


@pytest.fixture(params=KINDS)
def clients(request, tmp_path):
    """Clients of a database of each kind."""
    with open_clients(request.param, str(tmp_path), request) as opened:
        yield opened


@pytest.fixture(params=[k for k in KINDS if k != "mapping"])
def merging(request, tmp_path):
    """The same, of the kinds that resolve conflicts."""
    with open_clients(request.param, str(tmp_path), request) as opened:
        yield opened


@pytest.fixture
def local(request, tmp_path):
    """Clients of a FileStorage with blobs."""
    with open_clients("filestorage", str(tmp_path), request) as opened:
        yield opened


# -- disks


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 8 MiB."""
    if os.getuid() or not sys.platform.startswith("linux"):
        pytest.skip("needs root, to mount a small file system")
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield str(path)
    gc.collect()
    subprocess.run(["umount", "-l", str(path)], check=True)
