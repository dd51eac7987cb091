"""Names for the parameters of tests, which must be the same in each process that collects them."""

from __future__ import annotations

import re


def named(value):
    """A value's repr without addresses."""
    return re.sub(r"( object)? at 0x[0-9a-f]+", "", repr(value))
