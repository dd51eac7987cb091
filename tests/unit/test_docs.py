"""What is documented is true: all code of README and docs/ runs, links lead somewhere, made pages are current."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pathlib
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys

import pytest

import dask_zbig

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
ALL = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
#: A comment before a block: why it is not run, or what it wants: a database with arrays A and B, or files to import.
_BLOCK = re.compile(r"(?:<!-- (not run|prepare): (.*?) -->\n\s*)?^```(python|bash)\n(.*?)^```$", re.M | re.S)
NEEDS = {"xarray": "xarray", "zarr": "zarr", "h5py": "h5py", "pandas": "pandas"}
TOOLS = ("openssl", "rsync")

#: Runs the blocks of a page, one after the other: Python in one namespace, as if it were one script.
RUNNER = """
import json, subprocess, sys

def main():
    namespace = {"__name__": "__main__"}
    for line, language, source in json.load(open(sys.argv[1])):
        print(f"-- line {line}", flush=True)
        if language == "python":
            exec(compile("\\n" * line + source, sys.argv[2], "exec"), namespace)
        else:
            subprocess.run(["bash", "-euo", "pipefail"], input=source, text=True, check=True)

if __name__ == "__main__":
    main()
"""
CLOSE = """
if "db" in globals():
    conn.close()
    db.close()
"""
FILES = """
import h5py, numpy as np, zarr
x = np.arange(3000, dtype="f4").reshape(3, 1000)
np.save("x.npy", x)
np.save("A.npy", x)
x.tofile("x.dat")
zarr.open_group("x.zarr", mode="w").create_array("group/temperature", data=x)
with h5py.File("x.h5", "w") as file:
    file["g/d"] = x
"""
PREPARE = """
import dask_zbig as dz, transaction
db = dz.open({path!r})
conn = db.open()
for name in "AB":
    conn.root()[name] = A = dz.ZBigArray((400, 1000))
    A[...] = 1
transaction.commit()
conn.close()
db.close()
"""


def blocks(name):
    """(line, language, source) of all blocks that run."""
    text = (ROOT / name).read_text()
    for match in _BLOCK.finditer(text):
        mark, what, language, source = match.groups()
        line = text.count("\n", 0, match.start(4))
        if mark == "prepare":
            yield line, "python", CLOSE + (FILES if what == "files" else PREPARE.format(path=what))
        if mark != "not run":
            yield line, language, source


@pytest.mark.parametrize("name", [name for name in PAGES if list(blocks(name))])
def test_blocks_run(tmp_path, name):
    found = list(blocks(name))
    code = "\n".join(source for _, _, source in found)
    for module, package in NEEDS.items():
        if re.search(rf"\b{module}\b", code):
            pytest.importorskip(package)
    for tool in TOOLS:
        if re.search(rf"^{tool}\b|\"{tool}\b", code, re.M) and shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    (tmp_path / "runner.py").write_text(RUNNER)
    (tmp_path / "blocks.json").write_text(json.dumps(found))
    done = subprocess.run(
        [sys.executable, "runner.py", "blocks.json", name],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_few_blocks_are_left_out():
    """The README's two commands are CI's; the others need hosts, other libraries, or an environment of their own."""
    left = {}
    for name in PAGES:
        marked = [m for m in _BLOCK.finditer((ROOT / name).read_text()) if m.group(1) == "not run"]
        left[name] = len(marked)
    assert {name: n for name, n in left.items() if n} == {
        "README.md": 2,
        "docs/tutorial.md": 1,
        "docs/howto/hosts.md": 2,
        "docs/howto/coming-from.md": 1,
    }


# -- links


def _anchors(path):
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [name for name in ALL if (ROOT / name).exists()])
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        assert not anchor or anchor in _anchors(there), target


# -- made pages, and docstrings


def test_made_pages_are_current():
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    for name, text in pages.items():
        assert (ROOT / "docs" / "reference" / name).read_text() == text(), "run docs/generate.py"


def test_all_public_names_are_in_the_reference():
    text = (ROOT / "docs/reference/python.md").read_text()
    errors = importlib.import_module("dask_zbig.errors").__all__
    missing = [n for n in dask_zbig.__all__ if n not in errors and not re.search(rf":: (dask_zbig\.)?{n}$", text, re.M)]
    assert missing == []


def _modules():
    for info in pkgutil.walk_packages(dask_zbig.__path__, "dask_zbig."):
        if not info.name.endswith("._zbig"):
            yield info.name


@pytest.mark.parametrize("name", sorted(_modules()))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
