"""What a state machine's users may do, and with what: strategies of Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.actor import COUNTERS
from tests.machine import GAP

users = st.integers(0, 2)
values = st.integers(1, 60_000)
places = st.integers(0, 20) | st.sampled_from([2047, 2048, 2049, 100_000, 199_999, GAP, GAP + 999, GAP + 1000])
lengths = st.sampled_from([1, 1, 2, 30, 2048, 2049, 50_000, 120_000])
steps = st.sampled_from([1, 1, 1, 2, 3, 1000, 2048, -1, -7])
appended = st.sampled_from([0, 1, 5, 2048, 40_000])
sizes = st.sampled_from([0, 1, 9, 2047, 2048, 2049, 90_000, 150_000])
numbers = st.integers(0, 3)
how_to_write = st.sampled_from(["array", "view", "kept", "kept", "fancy"])
how_to_go_back = st.sampled_from(["all", "twice", "size"])
A_WRITE = {
    "at": places,
    "n": lengths,
    "step": steps,
    "value": values,
    "scalar": st.booleans(),
    "how": how_to_write,
    "which": numbers,
}
A_SIZE = {"size": sizes, "upper": st.booleans()}
#: What a user does: how often, and what it is given.
ACTIONS = {
    "write": (4, A_WRITE),
    "write_and_commit": (4, A_WRITE),
    "write_between": (
        1,
        {"which": numbers, "at": places, "n": lengths, "value": values, "other": st.fixed_dictionaries(A_WRITE)},
    ),
    "write_the_same": (1, {"at": places}),
    "count_up": (1, {"which": st.integers(0, COUNTERS - 1)}),
    "read": (1, {"at": places, "n": lengths, "step": steps}),
    "keep_view": (2, {}),
    "drop_views": (1, {}),
    "append": (2, {"n": appended, "value": values}),
    "resize": (2, A_SIZE),
    "resize_and_back": (2, {**A_SIZE, "n": appended, "at": places, "value": values, "how": how_to_go_back}),
    "commit": (3, {}),
    "begin": (1, {"abort": st.booleans(), "savepoint": st.booleans()}),
    "savepoint": (2, {}),
    "rollback": (2, {"which": numbers}),
    "disturb": (2, {"how": st.sampled_from(["minimize", "collect", "reset_caches"])}),
    "reopen": (1, {}),
    "undo": (2, {"back": st.sampled_from([1, 1, 1, 2, 3])}),
    "look_back": (1, {"which": numbers}),
    "pack": (1, {}),
}
WEIGHTED = [name for name, (weight, _) in ACTIONS.items() for _ in range(weight)]
# (not a rule for each: of these Hypothesis disables most, and repeats the others)
actions = st.sampled_from(WEIGHTED).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries(ACTIONS[name][1]))
)
