"""Every Python block of the README runs, in order, in one directory; and the docstrings' examples do."""

from __future__ import annotations

import doctest
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import dask_zbig

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "number"), [("README.md", 3), ("docs/coming-from.md", 1)])
def test_blocks_run(tmp_path, name, number):
    """Those that begin by importing us; the others are continued from elsewhere."""
    blocks = re.findall(r"^```python\n(import dask_zbig.*?)^```$", (ROOT / name).read_text(), re.M | re.S)
    assert len(blocks) >= number
    for number, block in enumerate(blocks):
        script = tmp_path / f"block{number}.py"
        body = "".join(f"    {line}\n" for line in block.splitlines())
        script.write_text(f"def main():\n{body}\nif __name__ == '__main__':\n    main()\n")
        (tmp_path / "data").mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"block {number}:\n{block}\n{done.stderr[-3000:]}"


def _modules():
    for info in pkgutil.walk_packages(dask_zbig.__path__, "dask_zbig."):
        if not info.name.endswith("._zbig"):
            yield info.name


@pytest.mark.parametrize("name", sorted(_modules()))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
