"""What there is to measure: sides, which run in a process each, and rows, which compare two of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["SIDES", "Place", "Row", "Side", "Skipped", "quartiles", "side", "sides_of", "value"]

Result = dict[str, Any]


class Skipped(Exception):
    """This machine has not what the side needs; the message says what."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a side runs, and how much it does. All sides of a round have the same directory."""

    directory: str
    mib: int  # size of the large arrays, a multiple of 64
    quick: bool

    def path(self, name: str) -> str:
        """A file's name in the round's directory."""
        return os.path.join(self.directory, name)

    def times(self, full: int) -> int:
        """How often something small is repeated: `full`, or a tenth of it when it must be quick."""
        return max(1, full // 10) if self.quick else full


@dataclass(frozen=True, slots=True)
class Side:
    """One measured program."""

    name: str
    run: Callable[[Place], Result]
    needs: tuple[str, ...]  # sides whose files it reads
    warm: float  # how many times the array's size is taken from the guest's memory before
    once: bool  # in the first round only: it takes long, or repeats by itself
    peer: str  # the other store that it needs, "" if none

    @property
    def durable(self) -> str:
        """What it does and how it is made durable: its docstring."""
        return " ".join((self.run.__doc__ or "").split())


SIDES: dict[str, Side] = {}


def side(
    name: str, *, needs: Sequence[str] = (), warm: float = 0, once: bool = False, peer: str = ""
) -> Callable[[Callable[[Place], Result]], Callable[[Place], Result]]:
    """Register a side. They run in the order in which they are registered."""

    def register(run: Callable[[Place], Result]) -> Callable[[Place], Result]:
        SIDES[name] = Side(name, run, tuple(needs), warm, once, peer)
        return run

    return register


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: what we take against what the reference takes; or, with no reference, against a limit.

    `ours` and `against` are ``SIDE:KEY``, KEY being one of what the side returned. The target is met if the ratio
    (with no reference: the value) is `most` at most.
    """

    case: str
    title: str
    ours: str
    against: str | None
    most: float
    unit: str = "s"


def sides_of(names: Sequence[str]) -> list[str]:
    """These sides and all that they need, in order."""
    wanted: set[str] = set()

    def add(name: str) -> None:
        if name not in wanted:
            wanted.add(name)
            for other in SIDES[name].needs:
                add(other)

    for name in names:
        add(name.partition(":")[0])
    return [name for name in SIDES if name in wanted]


def value(found: dict[str, list[Result]], which: str) -> list[float]:
    """What was measured, round by round; empty if it was skipped."""
    name, _, key = which.partition(":")
    return [float(result[key]) for result in found.get(name, ()) if key in result]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third
