"""A persistent object that nobody refers to any more dies in whatever thread lets it go last.

It stays in its connection's cache until its memory is freed. So nothing may run in between that lets another thread
have the interpreter: the connection's own thread would take it from there, and have a pointer to freed memory, soon to
be some other object. (`tests/stress/hammer.py` met that, on ZEO under load: a leaf referred to a blob of another
connection, and could not be stored.) Threads other than the connection's let objects go all the time: a garbage
collection runs in any of them.
"""

from __future__ import annotations

import gc
import sys
import threading

import numpy as np
import pytest
from ZODB.blob import Blob

SIZE = 4 << 20
SECONDS = 60.0


class Death:
    """Lets an object go in a thread of its own, which is held at the first Python function that it calls there."""

    def __init__(self, box):
        self._box = box
        self.called = None
        self._over = threading.Event()  # or held
        self._go_on = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        assert self._over.wait(SECONDS)

    def __exit__(self, *exc):
        self._go_on.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def _run(self):
        sys.settrace(self._trace)
        self._box.clear()
        sys.settrace(None)
        self._over.set()

    def _trace(self, frame, event, arg):
        if self.called is None and event == "call":
            self.called = frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name
            self._over.set()
            assert self._go_on.wait(SECONDS)


def array(connection):
    return connection.root()["A"]


def file(connection):
    return array(connection)._file


def node(connection):
    return file(connection).root


def leaf(connection):
    return node(connection).children[0]


def blob(connection):
    (ref,) = leaf(connection).refs
    assert isinstance(ref.obj, Blob)
    return ref.obj


PATH = [lambda connection: connection.root(), array, file, node, leaf, blob]


def above(find):
    return PATH[PATH.index(find) - 1]


# guard: tree.py, `_Callbacks`: no weak reference with a callback, as a WeakKeyDictionary has: the file, the node or the
# leaf was any object. segmentwriter.py, `_remove_if_not_stored`: not at the end of the blob; InvalidObjectReference
@pytest.mark.parametrize("find", PATH[1:])
def test_no_object_is_found_while_it_dies(local, find):
    local.new((1 << 30,), "u1")  # several leaves, so that there is a node
    one = local.connect()
    A = one.root["A"]
    A[:SIZE] = 1
    one.commit()
    one.begin()
    assert A[:SIZE].sum() == SIZE  # (watches what is on the way)
    connection, oid = one.connection, find(one.connection)._p_oid
    box = [find(connection)]
    del A
    one.close()
    one.tm.begin()
    one.connection = connection = local.db.open(one.tm)
    assert connection._cache.get(oid) is box[0]
    connection.cacheMinimize()
    gc.collect()
    references = sys.getrefcount(box[0])
    assert references == 2  # the box's, and that function's
    two = local.connect()
    above(find)(two.connection)
    death = Death(box)
    with death:
        found = find(connection)
    find(two.connection)  # a new object, where the other one's memory would be free
    one.root["A"][0] = 2
    one.commit()
    assert (found._p_jar, found._p_oid) == (connection, oid)
    assert death.called is None
    assert one.root["A"][:3].tolist() == [2, 1, 1]
    np.testing.assert_array_equal(one.root["A"][3:SIZE], 1)
