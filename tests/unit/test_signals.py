"""Ctrl-C that has to wait."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading

import pytest

from dask_zbig import signals
from dask_zbig.signals import ctrl_c_postponed


@pytest.fixture(autouse=True)
def handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield before
    signal.signal(signal.SIGINT, before)


def press():
    signal.raise_signal(signal.SIGINT)


def test_it_comes_after_the_block():
    done = []

    def run():
        with ctrl_c_postponed():
            press()
            press()
            done.append(True)
        done.append("too much")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == [True]
    with pytest.raises(KeyboardInterrupt):
        press()


def test_within_another():
    done = []

    def run():
        with ctrl_c_postponed():
            with ctrl_c_postponed():
                press()
                done.append(1)
            done.append(2)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == [1, 2]


def test_a_second_may_not_have_to_wait():
    done = []

    def run():
        with ctrl_c_postponed(once=True):
            press()
            done.append(1)
            press()
            done.append(2)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == [1]
    with pytest.raises(KeyboardInterrupt):
        press()


def test_the_block_fails_too():
    def run():
        with ctrl_c_postponed():
            press()
            raise ValueError("of the block")

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert str(caught.value.__context__) == "of the block"


def test_nothing_comes():
    with ctrl_c_postponed():
        pass
    with pytest.raises(ValueError, match="of the block"), ctrl_c_postponed():
        raise ValueError("of the block")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_programs_own_handler():
    came = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame.f_code.co_name)))
    with ctrl_c_postponed():
        press()
        assert came == []
    assert came == [(signal.SIGINT, "press")]


@pytest.mark.parametrize("fate", [signal.SIG_IGN, signal.SIG_DFL])
def test_python_does_not_handle_it(fate):
    signal.signal(signal.SIGINT, fate)
    with ctrl_c_postponed():
        assert signal.getsignal(signal.SIGINT) == fate


def test_another_thread():
    """Which cannot set handlers, and needs not: the main thread is interrupted, at once."""
    inside, over = threading.Event(), threading.Event()
    failed = []

    def run():
        try:
            with ctrl_c_postponed():
                inside.set()
                over.wait()
        except BaseException as e:  # noqa: BLE001 - to be shown by the main thread
            failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait()
    with pytest.raises(KeyboardInterrupt):
        press()
    over.set()
    thread.join()
    assert failed == []


def test_threading_was_imported_by_another_thread():
    """As in a program that embeds Python: then `threading` takes that one for the main thread, before Python 3.13."""
    program = f"""
import _thread, runpy, sys
over = _thread.allocate_lock()
over.acquire()
def run():
    try:
        postponed = runpy.run_path({signals.__file__!r})["ctrl_c_postponed"]
        with postponed():
            print("inside")
    finally:
        over.release()
assert "threading" not in sys.modules
_thread.start_new_thread(run, ())
over.acquire()
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "inside\n", done.stderr


def test_a_child_that_another_thread_forks_meanwhile():
    """In it the block never ends, and Ctrl-C must not wait for that."""
    program = """
import os, signal, threading
from dask_zbig.signals import ctrl_c_postponed
def fork():
    child = os.fork()
    if not child:
        try:
            signal.raise_signal(signal.SIGINT)
            for _ in range(1000):
                pass
        except KeyboardInterrupt:
            os._exit(7)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
with ctrl_c_postponed():
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
"""
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", program]  # (from 3.12 on)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_another_signals_handler_raises_just_before_the_end():
    def stop(*_):
        raise TimeoutError

    def run():
        signal.setitimer(signal.ITIMER_REAL, 20e-6)
        while True:
            with ctrl_c_postponed():
                pass

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(2000):
            with contextlib.suppress(TimeoutError):
                run()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGALRM, before)
