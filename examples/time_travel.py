"""What an array was, and how to get it back.

Shows: every commit is a snapshot; `at=` reads the past, by a transaction or by a time; `db.undo` takes one transaction
back, and keeps those after it if they changed other elements; a pack ends all that.

Run: python examples/time_travel.py
"""

from __future__ import annotations

import os
import tempfile
import time
from datetime import datetime, timezone

import numpy as np
import transaction

import dask_zbig as dz


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        db = dz.open(os.path.join(directory, "x.fs"))
        connection = db.open()
        connection.root()["A"] = array = dz.ZBigArray((4, 1000), "i8")
        versions = []
        for note, row, value in (("first", 0, 1), ("a mistake", 1, 666), ("more", 2, 3)):
            transaction.get().note(note)
            array[row] = value
            transaction.commit()
            versions.append(db.lastTransaction())
        when = datetime.now(timezone.utc)
        time.sleep(0.01)
        array.append(np.full((1, 1000), 9))
        transaction.commit()

        print("what each transaction left, first column:")
        for tid, info in zip(versions, reversed(db.undoInfo(1, 4)[:3]), strict=True):
            then = dz.from_zbigarray(array, at=tid).compute(scheduler="threads")
            print(f"  {info['description']:10} {then[:, 0]}")
        assert then[:, 0].tolist() == [1, 666, 3, 0]
        assert dz.from_zbigarray(array, at=when).shape == (4, 1000)
        assert array.shape == (5, 1000)

        # A connection that sees all of the past database, objects too.
        past = db.open(transaction.TransactionManager(), at=versions[0])
        print(f"as of then: {past.root()['A'][:, 0]}; now: {array[:, 0]}")
        assert past.root()["A"][:, 0].tolist() == [1, 0, 0, 0]
        past.close()

        mistake = next(info for info in db.undoInfo() if info["description"] == "a mistake")
        db.undo(mistake["id"])
        transaction.commit()
        print(f"without the mistake, but with what came later: {array[:, 0]}")
        assert array[:, 0].tolist() == [1, 0, 3, 0, 9]

        before = os.path.getsize(db.storage.getName())
        db.pack()
        print(f"packed, without a past: from {before:,} to {os.path.getsize(db.storage.getName()):,} bytes")
        assert os.path.getsize(db.storage.getName()) < before
        assert not db.undoInfo()
        assert array[:, 0].tolist() == [1, 0, 3, 0, 9]
        connection.close()
        db.close()


if __name__ == "__main__":
    main()
