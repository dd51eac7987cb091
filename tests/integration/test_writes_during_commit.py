"""What a view shows, and what becomes of what is written to it, in the middle of a commit that the storage merges.

Between vote and finish the connection forgets the leaves that were merged: they will have what others committed, too.
Until the next transaction begins, its views show what it has saved, and nothing of that.
"""

from __future__ import annotations

import numpy as np
import pytest

SIZE = 1 << 20


class BetweenVoteAndFinish:
    """Joins a transaction to do something there."""

    def __init__(self, manager, action):
        self.transaction_manager = manager
        self.action = action
        manager.get().join(self)

    def sortKey(self):
        return "~"  # the last

    def tpc_vote(self, transaction):
        self.action()

    def tpc_begin(self, transaction): ...
    def commit(self, transaction): ...
    def tpc_finish(self, transaction): ...
    def tpc_abort(self, transaction): ...
    def abort(self, transaction): ...


@pytest.fixture
def both(merging):
    """A client whose change of a[0] will be merged with a change of the last element; its view; another client."""
    merging.new(SIZE, "u1")
    one, A, two, B = merging.pair()
    a = A[:]
    assert a.sum() == 0
    a[0] = 1
    B[SIZE - 1] = 2
    two.commit()
    return one, a, two, B


def test_a_view_shows_what_is_being_saved(both):
    one, a, _, _ = both
    seen = []
    BetweenVoteAndFinish(one.tm, lambda: seen.extend([a[0], a[SIZE - 1]]))
    one.commit()
    assert seen == [1, 0]
    assert (a[0], a[SIZE - 1]) == (1, 2)


@pytest.mark.parametrize("place", [1, 5000, SIZE - 2])
def test_what_is_written_meanwhile_belongs_to_the_next_transaction(both, place):
    one, a, two, B = both

    def write():
        a[place] = 3

    BetweenVoteAndFinish(one.tm, write)
    one.commit()
    expected = np.zeros(SIZE, "u1")
    expected[[0, SIZE - 1]] = 1, 2
    two.begin()
    np.testing.assert_array_equal(B, expected)
    expected[place] = 3
    np.testing.assert_array_equal(a, expected)
    one.commit()
    two.begin()
    np.testing.assert_array_equal(B, expected)


def test_an_abort_after_it_was_merged_forgets_it(both):
    one, a, _, _ = both

    def fail():
        assert a[0] == 1
        a[1] = 3
        raise ZeroDivisionError

    BetweenVoteAndFinish(one.tm, fail)
    with pytest.raises(ZeroDivisionError):
        one.commit()
    one.abort()
    assert a[:2].tolist() == [0, 0]
    assert a[SIZE - 1] == 2
