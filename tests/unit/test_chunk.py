"""The ndarray that tasks get: a reference while it is a view of the mapping, a plain array after that."""

from __future__ import annotations

import copy
import gc
import os
import pickle

import numpy as np
import pytest
import transaction
from dask.sizeof import sizeof
from distributed.protocol import deserialize, serialize

import dask_zbig as dz
from dask_zbig.cluster import residency, worker
from dask_zbig.cluster.chunk import Chunk, open_chunk
from dask_zbig.cluster.snapshot import ArraySource, origin_of
from dask_zbig.errors import LoadError, SnapshotError

ROWS, COLUMNS = 400, 1000  # 3.2 MB: more than a block, and not a whole number of them


@pytest.fixture(autouse=True)
def _no_connection_stays():
    yield
    worker._pool = worker._Pool()
    gc.collect()


@pytest.fixture(scope="module")
def data():
    return np.arange(ROWS * COLUMNS, dtype="f8").reshape(ROWS, COLUMNS)


def store(connection, data, order="C"):
    connection.root()["A"] = array = dz.ZBigArray(data.shape, data.dtype, order)
    array[:] = data
    connection.transaction_manager.commit()
    return reference_to(array)


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):
    """Of a database that no test changes."""
    db = dz.open(tmp_path_factory.mktemp("chunk") / "x.fs")
    connection = db.open(transaction.TransactionManager())
    yield store(connection, data)
    connection.close()
    db.close()


@pytest.fixture
def client(local):
    """Of a database of the test's own."""
    return local.connect()


@pytest.fixture
def chunk(source):
    return source[:, :]


def reference_to(array):
    return ArraySource(origin_of(array), array.shape, array.dtype, array.order)


def through_dask(value):
    return deserialize(*serialize(value, serializers=["dask", "pickle"]))


def place(array):
    return array.__array_interface__["data"][0], array.nbytes


def resident(start, size):
    """Bytes of the mappings there that count as this process's memory."""
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                low, high = (int(x, 16) for x in first.split("-"))
                inside = low < start + size and high > start
            elif inside and first == "Rss:":
                total += int(line.split()[1]) << 10
    return total


# -- a reference


def test_it_is_a_read_only_array_with_the_data(chunk, data):
    assert type(chunk) is Chunk
    assert not chunk.flags.writeable
    assert np.array_equal(chunk, data)
    with pytest.raises(ValueError, match="read-only"):
        chunk[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        chunk += 1


VIEWS = {
    "all": lambda a: a,
    "rows": lambda a: a[10:20],
    "column": lambda a: a[:, 7],
    "backwards": lambda a: a[::-1, ::-3],
    "newaxis": lambda a: a[None, 3:5],
    "transposed": lambda a: a.T,
    "np.transpose": lambda a: np.transpose(a),
    "np.swapaxes": lambda a: np.swapaxes(a, 0, 1)[2:],
    "reshaped": lambda a: a.reshape(-1, 100),
    "np.reshape": lambda a: np.reshape(a, (100, -1)),
    "raveled": lambda a: a.ravel()[5:],
    "bytes": lambda a: a.view("u1")[:, 3:9],
    "flipped": lambda a: np.flip(a, 0),
    "broadcast": lambda a: np.broadcast_to(a[0], (4, COLUMNS)),
    "split": lambda a: np.split(a, 4)[2],
    "diagonal": lambda a: a[:, :ROWS].diagonal(),
}


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("again", [through_dask, lambda a: pickle.loads(pickle.dumps(a))], ids=["dask", "pickle"])
def test_a_view_of_it_travels_by_reference(chunk, data, make, again):
    view, expected = make(chunk), make(data)
    assert type(view) is Chunk
    assert sizeof(view) < 1000
    assert len(pickle.dumps(view)) < 1000
    assert sum(len(frame) for frame in serialize(view)[1]) == 0
    copied = again(view)
    assert type(copied) is Chunk
    assert copied.shape == expected.shape
    assert copied.strides == view.strides
    assert np.array_equal(copied, expected)


def test_a_column_maps_only_what_it_spans(source):
    part = source[10:12, 5]
    assert part._span == (COLUMNS + 1) * 8


def test_a_scalar_index_gives_a_scalar_and_nothing_lasts(chunk, data):
    assert type(chunk[3, 4]) is np.float64
    assert chunk[3, 4] == data[3, 4]


def test_structured_fields_also_out_of_order(client):
    data = np.zeros(1000, [("a", "i4"), ("b", "f8")])
    data["b"] = np.arange(1000)
    chunk = store(client.connection, data)[:]
    for part in (chunk["b"], chunk[["b", "a"]]):
        again = pickle.loads(pickle.dumps(part))
        assert type(again) is Chunk
        assert again.dtype == part.dtype
        assert np.array_equal(again, part)
    assert chunk["b"].sum() == 499500


def test_fortran_order_and_empty_chunks(client):
    expected = np.arange(1200, dtype="i4").reshape(30, 40)
    source = store(client.connection, expected, "F")
    chunk = pickle.loads(pickle.dumps(source[5:25, 3:30:2]))
    assert np.array_equal(chunk, expected[5:25, 3:30:2])
    empty = pickle.loads(pickle.dumps(source[5:5]))
    assert (empty.shape, empty.dtype, type(empty)) == ((0, 40), np.dtype("i4"), Chunk)


def test_it_outlives_the_connections(chunk, data):
    worker._pool = worker._Pool()
    gc.collect()
    assert np.array_equal(chunk, data)
    assert np.array_equal(pickle.loads(pickle.dumps(chunk)), data)


def test_it_stays_at_its_snapshot(client, data):
    source = store(client.connection, data)
    chunk = source[:]
    client.root["A"][:] = -1
    client.commit()
    assert np.array_equal(chunk, data)
    assert np.array_equal(source[:], data)
    assert np.array_equal(pickle.loads(pickle.dumps(chunk)), data)
    assert (reference_to(client.root["A"])[:] == -1).all()


# -- no reference any more

COMPUTATIONS = {
    "ufunc": lambda a: a + 1,
    "reflected": lambda a: 2 - a,
    "unary": lambda a: -a,
    "compare": lambda a: a > 3,
    "where=": lambda a: np.add(a, 1, where=a > 5, out=np.zeros(a.shape)),
    "sum": lambda a: a.sum(axis=0),
    "np.sum": lambda a: np.sum(a, axis=1),
    "mean": lambda a: a.mean(axis=0),
    "cumsum": lambda a: a.cumsum(axis=0),
    "matmul": lambda a: a[:5] @ a[:5].T,
    "dot": lambda a: np.dot(a[:5], a[:5].T),
    "einsum": lambda a: np.einsum("ij->i", a),
    "concatenate": lambda a: np.concatenate([a, a]),
    "nested": lambda a: np.block([[a, a], [a, a]]),
    "np.where": lambda a: np.where(a > 3, a, 0),
    "copy": lambda a: a.copy(),
    "copy.copy": lambda a: copy.copy(a),
    "copy.deepcopy": lambda a: copy.deepcopy(a),
    "np.array": lambda a: np.array(a),
    "np.copy": lambda a: np.copy(a),
    "astype": lambda a: a.astype("f4"),
    "astype same": lambda a: a.astype("f8"),
    "flatten": lambda a: a.flatten(),
    "take": lambda a: a.take([3, 1], axis=0),
    "np.take": lambda a: np.take(a, [3, 1], axis=1),
    "list": lambda a: a[[3, 1, 2]],
    "mask": lambda a: a[a[:, 0] > 3000],
    "copying reshape": lambda a: a.T.reshape(-1),
    "copying ravel": lambda a: a[:, 3:8].ravel(),
    "asarray": lambda a: np.asarray(a),
    "ascontiguousarray": lambda a: np.ascontiguousarray(a[:, ::2]),
}


@pytest.mark.parametrize("compute", COMPUTATIONS.values(), ids=COMPUTATIONS)
def test_what_is_computed_is_a_plain_array(chunk, data, compute):
    result, expected = compute(chunk), compute(data)
    assert type(result) is np.ndarray
    assert result.dtype == expected.dtype
    assert np.array_equal(result, expected)
    assert np.array_equal(through_dask(result), expected)


def test_whatever_else_numpy_returns_travels_by_value(chunk):
    result = chunk.repeat(2, axis=0)  # a method that knows nothing of chunks
    assert sizeof(result) >= result.nbytes
    assert len(pickle.dumps(result)) >= result.nbytes
    assert np.array_equal(through_dask(result), result)


def test_tricks_with_strides_travel_by_value(source):
    part = source[10:20]
    wide = np.lib.stride_tricks.as_strided(part, (5, COLUMNS), (16 * COLUMNS, 8), subok=True)
    assert sizeof(wide) >= wide.nbytes
    assert np.array_equal(through_dask(wide), part[::2])


def test_out_into_a_plain_array(chunk, data):
    out = np.empty_like(data)
    assert np.multiply(chunk, 2, out=out) is out
    assert np.array_equal(out, data * 2)
    with pytest.raises(ValueError, match="read-only"):
        np.multiply(data, 2, out=chunk)


def test_functions_with_namedtuples(chunk, data):
    result = np.linalg.eigh(chunk[:4, :4])
    assert np.array_equal(result.eigenvalues, np.linalg.eigh(data[:4, :4]).eigenvalues)


# -- memory


def test_its_pages_go_when_it_dies(source):
    chunk = source[:]
    at = place(chunk)
    np.asarray(chunk).sum()
    assert resident(*at) >= chunk.nbytes
    part = chunk[5:10]
    del chunk
    gc.collect()
    assert resident(*at) > 0
    del part
    gc.collect()
    assert resident(*at) < 1 << 20  # (not 0: somebody else may have the address by now)


def test_pages_of_living_chunks_are_given_back(source, monkeypatch):
    monkeypatch.setattr(residency, "BYTES", 8 << 20)
    monkeypatch.setattr(residency, "_count", 0)
    kept = source[:]
    first = kept.sum()
    assert resident(*place(kept)) >= kept.nbytes
    kept.sum()
    assert resident(*place(kept)) >= kept.nbytes
    kept.sum()  # 9.6 MB by now
    assert resident(*place(kept)) < 65536
    assert kept.sum() == first


def test_idle_connections_are_few_and_do_not_hold_much(source, monkeypatch):
    monkeypatch.setattr(worker, "RETIRE_BYTES", 10 << 20)
    used = []
    for _ in range(12):
        source[:].sum()
        used.append([used for _, _, used in worker._pool._idle.values()])
    assert max(len(u) for u in used) == 1
    assert [] in used  # it was closed, as enough had been mapped through it
    assert max(sum(u) for u in used) < 10 << 20


def test_threads_at_many_snapshots_keep_few_connections(client, caplog):
    sources = [store(client.connection, np.full(1000, k)) for k in range(worker.IDLE + 4)]
    chunks = [s[:] for s in sources]
    assert [int(c[0]) for c in chunks] == list(range(len(sources)))
    assert len(worker._pool._idle) == worker.IDLE
    held = [worker.reading(sources[0].origin.location, sources[0].origin.tid, 1) for _ in range(10)]
    for context in held:
        context.__enter__()
    for context in held:
        context.__exit__(None, None, None)
    assert len(worker._pool._idle) == worker.IDLE
    assert not [r for r in caplog.records if r.name.startswith("ZODB") and r.levelname != "INFO"]


# -- what can go wrong


# guard: worker.py, `_close`; without -> KeyError, in a task that has nothing to do with that database
def test_a_task_that_opened_a_connection_while_its_database_was_closed(source, client, data, tmp_path, monkeypatch):
    db = dz.open(tmp_path / "other.fs")
    other = db.open(transaction.TransactionManager())
    where = store(other, data).origin
    other.close()
    close = db._mvcc_storage.close

    def read_and_close():
        with worker.reading(where.location, where.tid, 1):
            pass
        close()

    monkeypatch.setattr(db._mvcc_storage, "close", read_and_close)
    db.close()
    ((_, connection, _),) = worker._pool._idle.values()
    assert connection.opened is not None  # by nobody who would close it
    for k in range(worker.IDLE):
        assert store(client.connection, np.full(1000, k))[:][0] == k
    assert connection not in [idle for _, idle, _ in worker._pool._idle.values()]


def test_a_segment_that_cannot_be_loaded_is_an_ordinary_error(local, client, data):
    """Not one that comes later, out of nowhere: the task fails and Dask may try it again."""
    source = store(client.connection, data)
    client.connection.cacheMinimize()
    gc.collect()
    directory = local.db.storage.fshelper.base_dir
    blobs = [os.path.join(at, name) for at, _, names in os.walk(directory) for name in names if name.endswith(".blob")]
    worker._pool = worker._Pool()
    for blob in blobs:
        os.rename(blob, blob + ".away")
    with pytest.raises(LoadError):
        source[:]
    for blob in blobs:
        os.rename(blob + ".away", blob)
    assert source[1, 1] == COLUMNS + 1


def test_a_snapshot_that_was_packed_away(local, client, data):
    source = store(client.connection, data)
    for value in (1, 2):
        client.root["A"][:] = value
        client.root["A"].resize((ROWS + value, COLUMNS))
        client.commit()
    worker._pool = worker._Pool()
    gc.collect()
    local.db.pack()
    with pytest.raises(SnapshotError, match="packed away"):
        source[:]


def test_a_closed_database_is_named(tmp_path):
    db = dz.open(tmp_path / "y.fs")
    with db.transaction() as connection:
        connection.root()["A"] = dz.ZBigArray(10)
    connection = db.open()
    source = reference_to(connection.root()["A"])
    connection.close()
    db.close()
    with pytest.raises(dz.ZBigError, match=r"y\.fs"):
        source[:]


def test_open_chunk_is_what_a_reference_calls(chunk):
    call, args = chunk[3:4].__reduce_ex__(5)
    assert call is open_chunk
    assert np.array_equal(call(*args), chunk[3:4])
