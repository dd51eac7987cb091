"""Points within a save at which a real process asks the test what is to happen to it: nothing, or the worst.

`watch_client`, `watch_server` and, as a preload of Dask workers, `dask_setup` lay them around functions of dask_zbig,
ZODB and ZEO, in processes that are otherwise as users have them. The answer comes through a unix socket, whose path is
in the environment: so the test knows exactly where the process is, and it waits there for as long as the test likes.
This file is loaded by those processes, and imports nothing of the tests.
"""

from __future__ import annotations

import functools
import os
import signal
import socket

VARIABLE = "ZBIG_TEST_STEPS"

CLIENT = [
    "client begins",
    "client has begun",
    "client stages",
    "client hears of a chunk",
    "client has staged",
    "client publishes",
    "client has published",
    "client votes",
    "client has voted",
    "client has finished",
    "client ends",
    "client has ended",
]
WORKER = [
    "worker stages",
    "worker has written",
    "worker votes",
    "worker has voted",
    "worker has finished",
    "worker has staged",
    "worker has answered",
]
SERVER = ["server votes", "server has voted", "server finishes", "server has finished"]


def at(step):
    """Ask, and return the answer; or do not return."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(os.environ[VARIABLE])
        asking.sendall(f"{os.getpid()} {step}\n".encode())
        with asking.makefile() as answers:
            answer = answers.readline().strip()
    if answer == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return answer


def around(owner, name, before, after):
    """Lay steps around a function or method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def stepped(*args, **options):
        again = before and at(before) == "again"
        result = original(*args, **options)
        if again:
            result = original(*args, **options)
        if after:
            at(after)
        return result

    setattr(owner, name, stepped)


def watch_client():
    from dask_zbig.cluster import coordinator, save
    from dask_zbig.storage.zeoclient import ClientStorage

    around(coordinator, "begin_job", "client begins", "client has begun")
    around(coordinator, "stage_all", "client stages", "client has staged")
    for module in (coordinator, save):  # each has it by name
        around(module, "publish", "client publishes", "client has published")
    around(ClientStorage, "tpc_vote", "client votes", "client has voted")
    around(ClientStorage, "tpc_finish", None, "client has finished")
    around(coordinator, "end_job", "client ends", "client has ended")


def watch_server():
    from dask_zbig.storage.filestorage import FileStorage

    around(FileStorage, "tpc_vote", "server votes", "server has voted")
    around(FileStorage, "tpc_finish", "server finishes", "server has finished")


async def dask_setup(worker):
    """Called in each worker process, as Dask does with a preload."""
    from distributed import WorkerPlugin

    from dask_zbig.cluster import store
    from dask_zbig.storage.zeoclient import ClientStorage

    around(store, "stage", "worker stages", None)
    around(store, "commit_entry", "worker has written", "worker has staged")
    around(ClientStorage, "tpc_vote", "worker votes", "worker has voted")
    around(ClientStorage, "tpc_finish", None, "worker has finished")

    class Answers(WorkerPlugin):
        def transition(self, key, start, finish, **more):
            if finish == "memory" and "zbig-stage" in str(key):
                at("worker has answered")

    await worker.plugin_add(Answers(), name="answers")
