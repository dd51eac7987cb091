"""What others could see: of exceptions, processes and graphs. For tests that look for secrets in it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pickle
import traceback

from dask.base import tokenize


def everything_in(error):
    """All that an exception shows, and those that led to it."""
    text = "".join(traceback.format_exception(error))
    while error is not None:
        text += repr(error) + repr(error.args) + repr(vars(error))
        error = error.__cause__ or error.__context__
    return text


def arguments():
    """Those of all processes that one can see."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            yield pathlib.Path("/proc", pid, "cmdline").read_bytes()


class Seen:
    """What a spy collects."""

    def __init__(self):
        self.bytes = b""

    def add(self, *things):
        for thing in things:
            text = thing if isinstance(thing, (bytes, str)) else repr(thing) + str(thing)
            self.bytes += (text if isinstance(text, bytes) else text.encode(errors="replace")) + b"\n"

    def graph(self, collection):
        """A Dask collection as it is sent, and as it is shown."""
        self.add(pickle.dumps(collection), pickle.dumps(dict(collection.__dask_graph__())))
        self.add(tokenize(collection), collection, collection.__dask_graph__())
