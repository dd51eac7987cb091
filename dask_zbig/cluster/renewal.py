"""Keeping a job alive while its client waits for the workers.

A lease says how long a job outlives whoever works for it, not how long the work may take. So the client renews it
all the time. (Workers do so as well, when they stage: see `dask_zbig.cluster.staging`.)
"""

from __future__ import annotations

import threading
import time
import weakref

from ZODB.POSException import POSError

from dask_zbig import database
from dask_zbig.cluster.staging import Job, JobGoneError, renew
from dask_zbig.errors import ZBigError

__all__ = ["Renewal"]

#: A renewal is tried again after this many seconds at most, if the server does not answer.
RETRY = 10.0
#: Seconds to wait, at the end, for a renewal that is under way.
PATIENCE = 5.0


class Renewal:
    """Renews a job's lease, each time a third of it is over, until it is stopped, dies, or the job is gone.

    While the server is away it keeps trying, also when the lease is over: nobody can remove the job meanwhile.

    Notes
    -----
    The thread that does this keeps neither the process nor this object alive. A forked child has none.
    """

    def __init__(self, job: Job) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=_keep, args=(job, self._stopped), name=f"zbig-lease-{job.id[:8]}", daemon=True
        )
        self._finalizer = weakref.finalize(self, self._stopped.set)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the job will be renewed. If not, it was stopped, or the job is gone."""
        return self._thread.is_alive() and not self._stopped.is_set()

    def stop(self) -> None:
        """Renew no more. A second call does nothing."""
        self._finalizer()
        if self._thread is not threading.current_thread():
            self._thread.join(PATIENCE)


def _keep(job: Job, stopped: threading.Event) -> None:
    pause = 0.0
    while not stopped.wait(pause):
        try:
            database.sync(database.database(job.location))  # a transaction that fails would be logged as an error
            term = renew(job, below=2 / 3)
        except JobGoneError:
            return
        except (ZBigError, POSError, OSError):  # the server is away, or the database is being closed
            pause = min(RETRY, max(2 * pause, 0.01))
        else:
            pause = max(term.until - time.time() - term.seconds * 2 / 3, 0.0) + term.seconds / 1000
