"""Address space over files, without any database: a Service that is only Python."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import shutil
import sys
import tempfile
import threading
import time

import dask.config
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dask_zbig import tempfiles
from dask_zbig.errors import ClosedError, ForkError, LoadError, ScratchError, WindowError
from dask_zbig.memory._native import BLOCK, PAGE, counters
from dask_zbig.memory.cache import CacheFile
from dask_zbig.memory.loader import ensure_loaders
from dask_zbig.memory.space import Space, StaleFill

U1 = np.dtype("u1")


class Fake:
    """A Service whose bytes come from `data`, as far as it goes, and then from a hole."""

    def __init__(self, directory, data=b""):
        self.path = os.path.join(directory, "base")
        with open(self.path, "wb") as file:
            file.write(data)
        self.size = len(data)
        self.served = []
        self.failures = []
        self.error = None
        self.gate = threading.Event()
        self.gate.set()
        self.space = Space(directory, self)
        ensure_loaders()

    def serve(self, lo, hi, recheck):
        self.served.append((lo, hi))
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        epoch = self.space.epoch
        for window in self.space.windows():
            self.fill(window, max(lo, window.start), min(hi, window.stop), epoch)

    def fill(self, window, lo, hi, epoch=None):
        fd = os.open(self.path, os.O_RDONLY)
        end = min(-(-self.size // PAGE) * PAGE, hi)
        pieces = [(lo, end, lo, fd)] if lo < end else []
        if end < hi:
            pieces.append((max(lo, end), hi, 0, -1))
        try:
            window.fill(self.space.epoch if epoch is None else epoch, lo, hi, pieces)
        finally:
            os.close(fd)

    def failed(self, lo, hi, error):
        self.failures.append((lo, hi, error))


def whole(window, size, writeable=True):
    return window.view(window.start, (size,), U1, (1,), writeable)


def written(generation, length):
    """What the scratch files hold: [(start, bytes)]."""
    out = []
    for start, stop, offset, number in generation.runs.tolist():
        with open(generation.files[number - generation.first_file], "rb") as file:
            file.seek(offset)
            out.append((start, file.read(min(stop, length) - start)))
    return out


@pytest.fixture
def directory(tmp_path):
    """A directory that the test leaves as it was, but for the base file."""
    yield str(tmp_path)
    all_gone(tmp_path)
    assert set(os.listdir(tmp_path)) <= {"base"}


def all_gone(directory):
    """Wait for the end of spaces that nobody refers to. A loader may for a moment, though it has done its work."""
    deadline = time.monotonic() + 60
    while gc.collect() >= 0 and any(name.endswith(".lock") for name in os.listdir(directory)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with tempfiles._own.guard:
        pass  # until the lock's descriptor is closed, too


def remove(paths):
    for path in paths:
        os.unlink(path)


DATA = np.random.default_rng(1).integers(0, 256, 2 * BLOCK + 5000, "u1").tobytes()


def test_read_faults_ask_the_service_once_a_block(directory):
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, 4 * BLOCK), 4 * BLOCK)
    assert service.served == []
    assert bytes(view[: len(DATA)]) == DATA
    assert not view[len(DATA) :].any()
    assert sorted(service.served) == [(k * BLOCK, (k + 1) * BLOCK) for k in range(4)]  # (memcpy may start at the end)


def test_eager_fill_takes_no_fault(directory):
    service = Fake(directory, DATA)
    window = service.space.window(0, 4 * BLOCK)
    assert window.absent(0, 4 * BLOCK) == 0
    service.fill(window, 0, 4 * BLOCK)
    assert window.absent(0, 4 * BLOCK) >= 4 * BLOCK
    before = counters()["read_faults"]
    assert bytes(whole(window, len(DATA))) == DATA
    assert counters()["read_faults"] == before
    assert service.served == []


def test_many_threads_load_a_block_once(directory):
    service = Fake(directory, DATA)
    service.gate.clear()
    view = whole(service.space.window(0, BLOCK), BLOCK)
    got = []
    threads = [threading.Thread(target=lambda: got.append(bytes(view[10:20]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    while not service.served:
        time.sleep(0.001)
    service.gate.set()
    for thread in threads:
        thread.join(60)
    assert got == [DATA[10:20]] * 8
    assert service.served == [(0, BLOCK)]


def test_a_window_that_starts_elsewhere(directory):
    service = Fake(directory, DATA)
    window = service.space.window(BLOCK + 100, BLOCK)
    assert (window.start, window.stop) == (BLOCK, 3 * BLOCK)
    view = window.view(BLOCK + 100, (10,), U1, (1,), True)
    assert bytes(view) == DATA[BLOCK + 100 : BLOCK + 110]


def test_strided_views_alias(directory):
    service = Fake(directory, DATA)
    window = service.space.window(0, BLOCK)
    forth = window.view(0, (3, 4), np.dtype("<u2"), (8, 2), True)
    back = window.view(16 + 6, (3, 4), np.dtype("<u2"), (-8, -2), True)
    forth[0, 0] = 0x1234
    assert back[2, 3] == 0x1234
    np.testing.assert_array_equal(forth, back[::-1, ::-1])
    remove(service.space.discard())


def test_a_view_that_is_not_writeable(directory):
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, BLOCK), BLOCK, writeable=False)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match=r"(?i)cannot set writeable"):
        view.flags.writeable = True


def test_write_freeze_and_write_again(directory):
    service = Fake(directory, DATA)
    space = service.space
    view = whole(space.window(0, 4 * BLOCK), 4 * BLOCK)
    view[5] = 1
    view[3 * BLOCK] = 2
    assert space.dirty_pages >= 2
    one = space.freeze()
    assert space.dirty_pages == 0
    files = [n for n in os.listdir(directory) if n.startswith("zbig")]
    assert sorted(one.files) == sorted(os.path.join(directory, n) for n in files)
    content = dict(written(one, 4 * BLOCK))
    assert content[0][:10] == DATA[:5] + b"\1" + DATA[6:10]
    assert content[3 * BLOCK][0] == 2
    assert not any(content[3 * BLOCK][1:])
    view[6] = 3  # belongs to the next generation
    assert (view[5], view[6], view[3 * BLOCK]) == (1, 3, 2)
    assert written(one, 4 * BLOCK)[0][1][:7] == DATA[:5] + b"\1" + DATA[6:7]
    two = space.freeze()
    assert two.first_file == one.first_file + len(one.files)
    assert written(two, BLOCK)[0][1][:7] == DATA[:5] + b"\1\3"
    remove(one.files + two.files)


def test_discard_goes_back_to_the_service(directory):
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, BLOCK), BLOCK)
    view[:] = 0
    epoch = service.space.epoch
    remove(service.space.discard())
    assert service.space.epoch > epoch
    assert service.space.dirty_pages == 0
    assert bytes(view) == DATA[:BLOCK]


def test_drop_keeps_dirty_pages(directory):
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, BLOCK), BLOCK)
    view[3] = 77
    other = DATA[::-1]
    with open(service.path + ".new", "wb") as file:
        file.write(other)
    os.replace(service.path + ".new", service.path)
    assert view[-1] == DATA[BLOCK - 1]
    service.space.drop(0, BLOCK)
    assert view[3] == 77
    assert view[-1] == other[BLOCK - 1]
    remove(service.space.discard())


def test_drop_of_holes_only(directory):
    service = Fake(directory, DATA[:PAGE])
    window = service.space.window(0, 4 * BLOCK)
    service.fill(window, 0, 4 * BLOCK)
    service.space.drop(0, 4 * BLOCK, holes_only=True)
    assert window.absent(0, 4 * BLOCK) == BLOCK
    assert window.present(BLOCK, 4 * BLOCK) >= 4 * BLOCK


def test_a_late_fill_is_refused(directory):
    service = Fake(directory, DATA)
    window = service.space.window(0, BLOCK)
    epoch = service.space.epoch
    service.space.drop(0, BLOCK)
    with pytest.raises(StaleFill):
        service.fill(window, 0, BLOCK, epoch)
    assert window.absent(0, BLOCK) == 0


def test_changes_show_in_every_window(directory):
    service = Fake(directory, DATA)
    one = whole(service.space.window(0, 2 * BLOCK), 2 * BLOCK)
    one[BLOCK + 1] = 99
    two = service.space.window(BLOCK, BLOCK).view(BLOCK, (BLOCK,), U1, (1,), True)
    assert two[1] == 99
    two[2] = 98
    two[-1] = 97
    assert (one[BLOCK + 2], one[2 * BLOCK - 1]) == (98, 97)
    generation = service.space.freeze()
    assert (one[BLOCK + 1], two[2]) == (99, 98)
    remove(generation.files)


def test_sequential_writes_take_few_faults(directory):
    service = Fake(directory)
    service.space.set_limit(16 * BLOCK)
    view = whole(service.space.window(0, 16 * BLOCK), 16 * BLOCK)
    before = counters()["write_faults"]
    view[:] = 1
    assert counters()["write_faults"] - before < 3 * 16
    assert service.space.dirty_pages == 16 * BLOCK // PAGE
    remove(service.space.discard())


def test_small_writes_stay_small(directory):
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, 2 * BLOCK), 2 * BLOCK)
    view[BLOCK + 12345] = 1
    assert service.space.dirty_pages == 1
    remove(service.space.discard())


def test_a_write_does_not_run_past_the_limit(directory):
    service = Fake(directory)
    service.space.set_limit(3 * PAGE)
    view = whole(service.space.window(0, BLOCK), BLOCK)
    view[: 3 * PAGE] = 1
    assert service.space.dirty_pages == 3
    view[5 * PAGE] = 1  # past it, still kept
    assert service.space.dirty_pages == 4
    remove(service.space.discard())


def test_write_as_a_call(directory):
    service = Fake(directory, DATA)
    window = service.space.window(0, 2 * BLOCK)
    service.fill(window, 0, 2 * BLOCK)
    view = whole(window, 2 * BLOCK)
    new = np.arange(2 * PAGE, dtype="u4").astype("u1")[: 2 * PAGE]
    faults = counters()["write_faults"]
    assert window.write(PAGE, new, len(new)) == 0
    np.testing.assert_array_equal(view[PAGE : 3 * PAGE], new)
    assert window.write(BLOCK, None, PAGE) == 0
    view[BLOCK] = 5
    assert counters()["write_faults"] == faults
    assert service.space.dirty_pages == 3
    assert view[PAGE - 1] == DATA[PAGE - 1]
    assert view[BLOCK + 1] == DATA[BLOCK + 1]
    remove(service.space.discard())


def raises_soon(error, action, seconds=30.0):
    """Errors of a fault are delivered at the next call or loop edge, not at once."""
    deadline = time.monotonic() + seconds
    with pytest.raises(error) as info:  # noqa: PT012 - for the same reason
        while time.monotonic() < deadline:
            action()
            for _ in range(1000):
                pass
    return info.value


def test_a_load_that_fails(directory):
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, BLOCK), BLOCK)
    service.error = LoadError("the disk is on fire")
    with dask.config.set({"zbig.load-timeout": "50 ms"}):
        error = raises_soon(LoadError, lambda: view[0])
    assert "on fire" in str(error)
    assert service.failures == [(0, BLOCK, service.error)]
    assert view[0] == 255
    service.error = None
    service.space.drop(0, BLOCK)
    assert bytes(view[:10]) == DATA[:10]


def test_a_load_from_what_is_closed_is_not_tried_again(directory):
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, BLOCK), BLOCK)
    service.error = ClosedError("it is over")
    with dask.config.set({"zbig.load-timeout": 20}):
        raises_soon(ClosedError, lambda: view[0])
    assert service.served == [(0, BLOCK)]
    assert view[0] == 255


def test_a_load_that_fails_when_its_block_is_not_what_it_was(directory):
    """The thread hears of it; but what it read is over, and the block is loaded anew."""
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, BLOCK), BLOCK)
    service.error = LoadError("the disk is on fire")
    told = service.failed

    def failed(lo, hi, error):
        told(lo, hi, error)
        service.error = None
        service.space.drop(0, BLOCK)

    service.failed = failed
    loaders = {t for t in threading.enumerate() if t.name.startswith("zbig-loader")}
    with dask.config.set({"zbig.load-timeout": 0.01}):
        raises_soon(LoadError, lambda: view[0])
    assert bytes(view[:10]) == DATA[:10]
    assert len(service.failures) == 1
    assert {t for t in loaders if t.is_alive()} == loaders


# guard: loader.py, `_give_up`: `window.lost`; removed -> the thread asks again for ever
def test_a_load_that_fails_where_nothing_can_be_mapped(directory, monkeypatch):
    """There may be no mapping left for 0xFF. It reads zeros, which nobody can commit."""
    service = Fake(directory, DATA)
    window = service.space.window(0, 2 * BLOCK)
    view = whole(window, 2 * BLOCK)
    service.error = LoadError("the disk is on fire")

    def fill(self, *_):
        raise WindowError("there are too many mappings")

    with monkeypatch.context() as patch, dask.config.set({"zbig.load-timeout": 0.01}):
        patch.setattr(type(window), "fill", fill)
        raises_soon(LoadError, lambda: view[0])
    assert [failure[:2] for failure in service.failures] == [(0, BLOCK)]
    assert (view[0], view[BLOCK]) == (0, 0)
    with pytest.raises(WindowError):
        service.space.freeze()
    service.space.discard()
    service.error = None
    assert bytes(view[:10]) == DATA[:10]


# guard: loader.py: `if thread in _loaders`; removed -> the loader of the first block dies of the second one's error
def test_a_load_by_a_loader_that_fails(directory, tmp_path_factory):
    """As a finalizer in one of them may cause: it goes on, and serves who waits for it."""
    other = Fake(str(tmp_path_factory.mktemp("other")), DATA)
    other.error = LoadError("the disk is on fire")
    theirs = whole(other.space.window(0, BLOCK), BLOCK)
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, BLOCK), BLOCK)
    serve, seen = service.serve, []

    def touch_and_serve(lo, hi, recheck):
        seen.append(theirs[0])
        for _ in range(1000):  # an asynchronous exception comes at the next call or loop edge
            pass
        serve(lo, hi, recheck)

    service.serve = touch_and_serve
    loaders = {t for t in threading.enumerate() if t.name.startswith("zbig-loader")}
    with dask.config.set({"zbig.load-timeout": 0.01}):
        assert bytes(view[:10]) == DATA[:10]
    assert seen == [255]
    assert [failure[:2] for failure in other.failures] == [(0, BLOCK)]
    assert service.failures == []
    for _ in range(20):
        service.space.drop(0, BLOCK)
        assert view[0] == DATA[0]
    assert {t for t in loaders if t.is_alive()} == loaders


def test_a_load_that_fails_for_a_while(directory):
    service = Fake(directory, DATA)
    view = whole(service.space.window(0, BLOCK), BLOCK)
    service.error = OSError("not yet")
    got = []
    thread = threading.Thread(target=lambda: got.append(bytes(view[:10])))
    thread.start()
    while len(service.served) < 2:
        time.sleep(0.001)
    service.error = None
    thread.join(60)
    assert got == [DATA[:10]]
    assert service.failures == []


def test_a_file_truncated_under_us(directory):
    service = Fake(directory, DATA)
    window = service.space.window(0, BLOCK)
    service.fill(window, 0, BLOCK)
    view = whole(window, BLOCK)
    os.truncate(service.path, PAGE)
    assert view[0] == DATA[0]
    service.size = PAGE  # what the service says on being asked again
    assert view[BLOCK // 2] == 0
    assert service.served == [(0, BLOCK)]


def test_after_close(directory):
    service = Fake(directory, DATA)
    window = service.space.window(0, 2 * BLOCK)
    view = whole(window, 2 * BLOCK)
    assert view[0] == DATA[0]
    service.space.close()
    assert bytes(view[:10]) == DATA[:10]
    raises_soon(ClosedError, lambda: view[BLOCK])
    assert view[BLOCK] == 255
    raises_soon(ClosedError, lambda: view.__setitem__(5, 1))
    assert service.space.discard() == []  # what is written now goes to memory that is nobody's


def test_who_was_served_meanwhile_does_not_hear_of_a_load_that_the_close_overtook(directory):
    service = Fake(directory, DATA)
    service.error = LoadError("too late")
    service.gate.clear()
    window = service.space.window(0, BLOCK)
    view = whole(window, BLOCK)
    read, stop, errors = threading.Event(), threading.Event(), []

    def go_on():
        try:
            assert view[0] == DATA[0]
            read.set()
            while not stop.wait(0.001):
                pass
        except Exception as error:  # noqa: BLE001 - whatever it is
            errors.append(error)

    thread = threading.Thread(target=go_on)
    with dask.config.set({"zbig.load-timeout": 0.01}):
        thread.start()
        while not service.served:
            time.sleep(0.001)
        service.fill(window, 0, BLOCK)
        assert read.wait(60)
        service.space.close()
        service.gate.set()
        loaders = [t.ident for t in threading.enumerate() if t.name.startswith("zbig-loader")]
        deadline = time.monotonic() + 60
        while any(sys._current_frames()[i].f_code.co_name != "_run" for i in loaders):  # it has not given up yet
            assert time.monotonic() < deadline
            time.sleep(0.001)
    stop.set()
    thread.join(60)
    assert errors == []
    assert service.failures == []


def test_no_directory_for_scratch(tmp_path):
    service = Fake(str(tmp_path), DATA)
    os.mkdir(tmp_path / "gone")
    service.space.move_scratch(str(tmp_path / "gone"))
    shutil.rmtree(tmp_path / "gone")
    view = whole(service.space.window(0, BLOCK), BLOCK)
    raises_soon(ScratchError, lambda: view.__setitem__(0, 1))
    assert service.space.error
    with pytest.raises(ScratchError):
        service.space.freeze()
    assert service.space.discard() == []
    assert not service.space.error
    service.space.move_scratch(str(tmp_path))
    assert bytes(view[:2]) == DATA[:2]
    view[0] = 1
    remove(service.space.discard())


def test_a_window_too_large(directory):
    service = Fake(directory)
    with pytest.raises(WindowError, match="address space"):
        service.space.window(0, 1 << 60)
    assert service.space.windows() == []


def test_a_terabyte_of_nothing(directory):
    service = Fake(directory)
    before = counters()["mappings"]
    window = service.space.window(0, 1 << 40)
    service.fill(window, 0, 1 << 40)
    assert counters()["mappings"] - before < 10
    assert whole(window, 1 << 40)[-1] == 0


def test_windows_go_with_their_last_view(directory):
    service = Fake(directory, DATA)
    window = service.space.window(0, BLOCK)
    assert window.idle
    view = whole(window, BLOCK)
    part = view[10:20][::2]
    del view
    assert not window.idle
    del window
    gc.collect()
    assert len(service.space.windows()) == 1
    assert part[0] == DATA[10]
    del part
    deadline = time.monotonic() + 60
    while gc.collect() >= 0 and service.space.windows():  # a loader may for a moment refer to one
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_release_changes_nothing(directory):
    service = Fake(directory, DATA)
    window = service.space.window(0, BLOCK)
    view = whole(window, BLOCK)
    view[0] = 1
    assert view[-1] == DATA[BLOCK - 1]
    window.release()
    assert (view[0], view[-1]) == (1, DATA[BLOCK - 1])
    remove(service.space.discard())


def test_fork(directory):
    service = Fake(directory, DATA)
    window = service.space.window(0, BLOCK)
    view = whole(window, BLOCK)
    view[0] = 1
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                service.space.window(0, BLOCK)
            except ForkError:
                status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    pid = os.fork()
    if not pid:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)  # the core says why it kills
        faulthandler.disable()
        view[0] = 2
        os._exit(0)
    assert os.waitpid(pid, 0)[1] != 0
    assert view[0] == 1
    remove(service.space.discard())


def test_descriptors_do_not_leak(directory):
    def use():
        service = Fake(directory, DATA)
        view = whole(service.space.window(0, 2 * BLOCK), 2 * BLOCK)
        view[::PAGE] = 1
        remove(service.space.freeze().files)
        view[0] = 2
        remove(service.space.discard())
        assert view[1] == DATA[1]

    use()
    all_gone(directory)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        use()
    all_gone(directory)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_cache_file(directory):
    cache = CacheFile(directory)
    fd, first = cache.add(b"a" * PAGE)
    _, second = cache.add(bytearray(b"b" * 2 * PAGE))
    assert os.pread(fd, PAGE, first) == b"a" * PAGE
    assert os.pread(fd, 2 * PAGE, second) == b"b" * 2 * PAGE
    cache.punch(first, PAGE)
    assert os.pread(fd, 1, first) == b"\0"
    with pytest.raises(ValueError, match="whole pages"):
        cache.add(b"abc")
    with pytest.raises(ScratchError):
        CacheFile(os.path.join(directory, "none")).add(b"a" * PAGE)


# -- all operations in any order, against a bytearray

SIZE = 3 * BLOCK
positions = st.integers(0, SIZE - 1) | st.builds(lambda k, d: k * PAGE + d, st.integers(0, 1535), st.integers(0, 9))
sizes = st.sampled_from([1, 7, PAGE, 3 * PAGE + 1, BLOCK])


class SpaceMachine(RuleBasedStateMachine):
    @initialize(data=st.sampled_from([b"", DATA]))
    def start(self, data):
        self.directory = tempfile.TemporaryDirectory()
        self.service = Fake(self.directory.name, data)
        self.space = self.service.space
        self.base = np.zeros(SIZE, "u1")
        self.base[: len(data)] = np.frombuffer(data, "u1")
        self.now = self.base.copy()
        self.views = [whole(self.space.window(0, SIZE), SIZE)]
        self.value = 0

    def at(self, lo, size):
        return slice(lo, min(lo + size, SIZE))

    @rule(lo=positions, size=sizes, which=st.integers(0, 9))
    def write(self, lo, size, which):
        self.value = self.value % 255 + 1
        self.views[which % len(self.views)][self.at(lo, size)] = self.value
        self.now[self.at(lo, size)] = self.value

    @rule(lo=positions, size=sizes, which=st.integers(0, 9))
    def read(self, lo, size, which):
        where = self.at(lo, size)
        np.testing.assert_array_equal(self.views[which % len(self.views)][where], self.now[where])

    @rule()
    def another_window(self):
        if len(self.views) < 3:
            self.views.append(whole(self.space.window(0, SIZE), SIZE))

    @rule()
    def discard(self):
        remove(self.space.discard())
        self.now[:] = self.base

    @rule()
    def save(self):
        """Freeze, and make what was written the base."""
        generation = self.space.freeze()
        changed = np.zeros(SIZE, bool)
        with open(self.service.path, "r+b") as file:
            file.truncate(SIZE)
            for start, data in written(generation, SIZE):
                file.seek(start)
                file.write(data)
                changed[start : start + len(data)] = True
        assert not (changed < (self.base != self.now)).any()
        self.service.size = SIZE
        remove(generation.files)
        self.space.drop(0, SIZE)
        self.base[:] = self.now

    @rule(lo=positions, size=sizes)
    def drop(self, lo, size):
        self.space.drop(lo, min(lo + size, SIZE))

    @rule()
    def release(self):
        for window in self.space.windows():
            window.release()

    @invariant()
    def scratch_only_while_dirty(self):
        if hasattr(self, "space") and not self.space.dirty_pages:
            assert [n for n in os.listdir(self.directory.name) if n.startswith("zbig")] == []

    def teardown(self):
        if hasattr(self, "space"):
            for view in self.views:
                np.testing.assert_array_equal(view, self.now)
            remove(self.space.discard())
            self.views.clear()
            self.directory.cleanup()


TestSpaceMachine = SpaceMachine.TestCase
TestSpaceMachine.settings = settings(max_examples=15, stateful_step_count=30)


@pytest.mark.slow
class TestSpaceMachineLong(SpaceMachine.TestCase):
    settings = settings(max_examples=500, stateful_step_count=100)
