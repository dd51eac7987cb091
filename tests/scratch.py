"""Scratch files that somebody has left behind."""

from __future__ import annotations

import os

from dask_zbig import transaction


def in_use():
    """The names of those in which open arrays go on after a small commit: one each."""
    managers = list(transaction._managers.values())
    sources = [opened._scratch for manager in managers for opened in list(manager.files.values())]
    return {os.path.basename(source.path) for source in sources if source is not None}


def left(directory):
    """The names of all others."""
    return sorted({name for name in os.listdir(directory) if name.startswith("zbig")} - in_use())
