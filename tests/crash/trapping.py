"""Python's side of trap.c: arm it, read its log. For the scripts beside it, which run in processes of their own."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
from dataclasses import dataclass

KILL_BEFORE, KILL_AFTER, FAIL, FAIL_FROM, SHORT = range(1, 6)
MARK = "mark"
_HEADER = struct.Struct("=IIqqIIII")
_SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trap.c")


class Trap:
    """The library in this process. Paths are those of files in `directory`."""

    def __init__(self, library, directory, log=None):
        self._lib = ctypes.CDLL(library)
        self._lib.trap_arm.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._lib.trap_disarm.restype = ctypes.c_long
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        fd = -1 if log is None else os.open(log, flags, 0o600)
        code = self._lib.trap_install(os.fsencode(directory), fd)
        if code:
            raise OSError(-code, "no seccomp filter here")

    def arm(self, when=0, how=0, error=0):
        """Do `how` at call number `when`, counted from now."""
        self._lib.trap_arm(when, how, error)

    def disarm(self):
        """Returns the number of calls since `arm`."""
        return self._lib.trap_disarm()

    def mark(self, text):
        """Put a word into the log."""
        self._lib.trap_mark(text.encode())


@dataclass(frozen=True)
class Call:
    """One line of the log. `extra`: see trap.c."""

    name: str
    result: int
    extra: int
    path: str
    other: str
    data: bytes
    is_directory: bool

    def __str__(self):
        return f"{self.name} {self.path} {self.other} {self.extra}+{len(self.data)} -> {self.result}"


def read_log(path):
    """The calls in the order in which they were done."""
    names = _names()
    with open(path, "rb") as file:
        text = file.read()
    calls, at = [], 0
    while at < len(text):
        _, number, result, extra, *lengths, is_directory = _HEADER.unpack_from(text, at)
        at += _HEADER.size
        parts = []
        for length in lengths:
            parts.append(text[at : at + length])
            at += length
        name = MARK if number == 2**32 - 1 else names[number]
        path, other = (os.path.normpath(os.fsdecode(part)) if part else "" for part in parts[:2])
        calls.append(Call(name, result, extra, path, other, parts[2], bool(is_directory)))
    return calls


def _names():
    """System calls by number, as in trap.c."""
    with open(_SOURCE) as file:
        wanted = set(re.findall(r"SYS_(\w+)", file.read()))
    lines = "\n".join(["#include <sys/syscall.h>", *(f"{name} SYS_{name}" for name in wanted), ""])
    done = subprocess.run(["gcc", "-E", "-P", "-x", "c", "-"], input=lines, text=True, capture_output=True, check=True)
    found = re.findall(r"^(\w+) (\d+)$", done.stdout, re.MULTILINE)
    return {int(number): name for name, number in found}
