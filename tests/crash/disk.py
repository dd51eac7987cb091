"""A disk that writes in whatever order it likes, and the states in which a power cut may leave it.

What was synced is there. Each write, truncation, or change of a directory's entry since then may be there or not,
independently of all others; one write may be there in part, by sectors of 512 bytes, the rest being zeros or what was
there before. Only a rename within one directory is one step, as all file systems do it; across directories it is two.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from dataclasses import dataclass, field

SECTOR = 512
PAGE = 4096
NO_CHANGE = ("close", "chmod", "fchmod", "fchmodat", "sync_file_range")


@dataclass(eq=False)
class Node:
    """A file or a directory: as it is, and as it is on the disk for certain."""

    is_directory: bool
    live: object = None
    durable: object = None

    @classmethod
    def new(cls, is_directory):
        return cls(is_directory, *(({}, {}) if is_directory else (b"", b"")))


@dataclass(eq=False)
class Change:
    """One of a node, not synced yet. The rest depends: entries of a directory; or `offset` and data; or the size."""

    node: Node
    entries: dict | None = None
    offset: int = 0
    data: bytes | None = None
    size: int = 0

    def apply(self, content):
        if self.entries is not None:
            return {name: node for name, node in {**content, **self.entries}.items() if node is not None}
        if self.data is None:
            return content[: self.size].ljust(self.size, b"\0")
        content = content.ljust(self.offset, b"\0")
        return content[: self.offset] + self.data + content[self.offset + len(self.data) :]

    def torn(self, old):
        """The parts of this write that may be all there is of it, on a file with the content `old`."""
        if not self.data:
            return
        end = self.offset + len(self.data)
        under = old[self.offset : end].ljust(len(self.data), b"\0")  # the file gets its new size
        yield under
        cuts = range(self.offset // SECTOR * SECTOR + SECTOR, end, SECTOR)
        for cut in random.Random(end).sample(cuts, min(6, len(cuts))):
            at = cut - self.offset
            yield self.data[:at]
            yield self.data[:at] + under[at:]
            yield under[:at] + self.data[at:]


@dataclass
class Disk:
    """What is below `top`, in the beginning as it is there now. Feed it with calls; `states` at any time."""

    top: str
    root: Node = field(default_factory=lambda: Node.new(True))
    pending: list = field(default_factory=list)

    def __post_init__(self):
        for folder, directories, names in os.walk(self.top):
            here = self._find(folder)
            for name in directories + names:
                path = os.path.join(folder, name)
                node = here.live[name] = here.durable[name] = Node.new(os.path.isdir(path))
                if not node.is_directory:
                    with open(path, "rb") as file:
                        node.live = node.durable = file.read()

    # -- calls

    def call(self, call):
        """Do what a call did. Returns whether it was a sync, which ends a set of states."""
        if call.result < 0 or call.path.endswith(" (deleted)") or not self._is_below(call.path):
            return False
        if call.name in ("openat", "open"):
            self._opened(call)
        elif call.name in ("write", "pwrite64"):
            self._write(self._find(call.path), call.extra, call.data[: call.result])
        elif call.name in ("fsync", "fdatasync"):
            return self._synced(call)
        elif call.name in ("ftruncate", "truncate"):
            self._change(Change(self._find(call.path), size=call.extra))
        elif call.name in ("mkdir", "mkdirat"):
            self._enter(call.path, Node.new(True))
        elif call.name in ("unlink", "unlinkat", "rmdir"):
            self._enter(call.path, None)
        elif call.name in ("link", "linkat"):
            self._enter(call.other, self._find(call.path))
        elif call.name in ("rename", "renameat", "renameat2"):
            self._renamed(call.path, call.other)
        elif call.name not in NO_CHANGE:
            raise AssertionError(f"what does this do? {call}")
        return False

    def _opened(self, call):
        if call.extra & 1:
            self._enter(call.path, Node.new(False))
        elif call.extra & 2 and self._find(call.path).live:
            self._change(Change(self._find(call.path), size=0))

    def _renamed(self, path, other):
        node = self._find(path)
        if os.path.dirname(path) == os.path.dirname(other):
            names = {os.path.basename(path): None, os.path.basename(other): node}
            if self._find(other, missing=True) is not node:  # two names of one file: nothing happens
                self._change(Change(self._find(os.path.dirname(path)), names))
        else:
            self._enter(other, node)
            self._enter(path, None)

    def _synced(self, call):
        node = self._find(call.path)
        if not node.is_directory and node.live != call.data:  # by stores into a mapping
            for at in range(0, len(call.data), PAGE):
                if node.live[at : at + PAGE] != call.data[at : at + PAGE]:
                    self._write(node, at, call.data[at : at + PAGE])
        mine = [change for change in self.pending if change.node is node]
        for change in mine:
            node.durable = change.apply(node.durable)
        self.pending = [change for change in self.pending if change.node is not node]
        return bool(mine)

    def _write(self, node, offset, data):
        if data:
            self._change(Change(node, offset=offset, data=data))

    def _enter(self, path, node):
        self._change(Change(self._find(os.path.dirname(path)), {os.path.basename(path): node}))

    def _change(self, change):
        change.node.live = change.apply(change.node.live)
        self.pending.append(change)

    def _is_below(self, path):
        return path == self.top or path.startswith(self.top + "/")

    def _find(self, path, missing=False):
        node = self.root
        for name in os.path.relpath(path, self.top).split("/"):
            if name != ".":
                node = node.live.get(name) if missing else node.live[name]
        return node

    # -- power cuts

    def states(self, most, seed=0):
        """Trees, each a dict of paths to bytes, None for a directory; at most `most` of them besides the torn ones."""
        for kept in _subsets(len(self.pending), most, seed):
            yield self._tree([self.pending[i] for i in kept])
        for i, change in enumerate(self.pending):
            if change.data is None:
                continue
            for others in (self.pending[:i], self.pending[:i] + self.pending[i + 1 :]):
                old = change.node.durable
                for other in others:
                    old = other.apply(old) if other.node is change.node else old
                for part in change.torn(old):
                    torn = Change(change.node, offset=change.offset, data=part)
                    yield self._tree([*others[:i], torn, *others[i:]])

    def _tree(self, changes):
        contents = {}
        for change in changes:
            contents[change.node] = change.apply(contents.get(change.node, change.node.durable))
        tree = {}

        def walk(node, path):
            content = contents.get(node, node.durable)
            tree[path] = None if node.is_directory else content
            for name, child in content.items() if node.is_directory else ():
                walk(child, f"{path}/{name}" if path else name)

        walk(self.root, "")
        return tree


def _subsets(n, most, seed):
    """All subsets of range(n); or none, all, single ones, all but single ones, and some more by chance."""
    if 2**n <= most:
        yield from itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(n + 1))
        return
    yield ()
    yield tuple(range(n))
    chance = random.Random(seed)
    for i in range(n):
        yield (i,)
        yield tuple(j for j in range(n) if j != i)
        yield tuple(range(i))
    for _ in range(most):
        density = chance.random()
        yield tuple(i for i in range(n) if chance.random() < density)


def digest(tree):
    """The same for equal trees."""
    total = hashlib.sha256()
    for path in sorted(tree):
        content = tree[path]
        total.update(f"{path}\0{-1 if content is None else len(content)}\0".encode() + (content or b""))
    return total.digest()


def materialise(tree, directory):
    """Make it."""
    for path, content in tree.items():  # (directories come first)
        full = os.path.join(directory, path)
        if content is None:
            os.makedirs(full, exist_ok=True)
        else:
            with open(full, "wb") as file:
                file.write(content)
