"""What can happen to a cluster's save: the faults, and how they are drawn at random."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests import steps  # isort: skip
from tests.proxy import Trouble  # isort: skip


@dataclass(frozen=True)
class Fault:
    """What happens when a process gets to a step for the `nth` time.

    - die: it is killed. (The server is started again.)
    - server dies: the server is killed, and started again while the process goes on.
    - server starts again: the same, but the process goes on when it is there.
    - both die: the process, and the server, which is started again.
    - worker dies: one of Dask's.
    - cut: everybody's connection to the server is lost.
    - again: the process does it twice.
    - pack: the garbage is removed, and the database packed.
    - hold: the process waits, while another client saves the same.
    - meet: the process waits for another one that gets there.
    - trouble: something is about to happen to a message.

    after
        Only what comes after this step counts.
    """

    step: str
    action: str = "die"
    nth: int = 1
    after: str | None = None
    trouble: Trouble | None = None


# -- faults at random

SENT = [b"vote", b"tpc_finish", b"tpc_begin", b"storea", b"storeBlob", b"checkCurrent", b"new_oids", b"loadBefore", b""]
RECEIVED = [b".reply", b"invalidateTransaction", b"receiveBlob", b""]


def a_fault(chance):
    """Any fault that leaves somebody to go on."""
    step = chance.choice([*steps.CLIENT, *steps.WORKER, *steps.SERVER])
    locked = step.endswith("has voted")  # the storage is, and nobody else can commit
    actions = ["die", "die", "cut"]
    if step in steps.SERVER:
        actions = ["die", "die", "cut"]
    else:
        actions += ["server dies", "server dies", "server starts again", "both die"]
        actions += [] if locked else ["pack"]
    if step in steps.CLIENT:
        actions += ["worker dies"] + ([] if locked else ["hold", "hold"])
    if step == "worker stages":
        actions += ["again", "again", "again"]
    return Fault(step, chance.choice(actions), chance.choice([1, 1, 1, 2, 2, 3, 4, 6]))


def a_trouble(chance):
    what = chance.choice(["lose", "halve", "halve", "unanswer", "unanswer", "belate", "delay"])
    to_server = what == "belate" or chance.random() < 0.7
    word = chance.choice(SENT if to_server else RECEIVED)
    nth = chance.choice([1, 2, 3, 5, 8]) * (5 if word in (b"", b".reply") else 1)
    return Trouble(what, word, nth, to_server, chance.choice([0.05, 0.3, 0.8]))


def a_run(seed):
    """What `Site.run` is given."""
    chance = random.Random(seed)
    number = chance.choice([1, 1, 1, 2, 2, 3])
    troubles = [a_trouble(chance) for _ in range(number) if chance.random() < 0.35]
    kills = [(chance.choice(["client", "server", "worker"]), chance.uniform(0, 0.5)) for _ in range(number)]
    return {
        "faults": [a_fault(chance) for _ in range(number - len(troubles))],
        "kills": kills if chance.random() < 0.15 else [],
        "troubles": troubles,
        "how": chance.choice(["coordinator", "coordinator", "coordinator", "transaction", "delayed"]),
        "shared": chance.random() < 0.7,
        "retry": chance.random() < 0.5,
    }
