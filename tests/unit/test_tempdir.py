"""Private directories, and who removes them."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

from dask_zbig.storage.tempdir import PrivateDirectory


def test_private_directories_of_the_dead_are_removed(tmp_path):
    code = (
        "import os, sys; from dask_zbig.storage.tempdir import PrivateDirectory as P;"
        "d = P('test', sys.argv[1]); open(d.path + '/x', 'w').close(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], timeout=120)
    (left,) = tmp_path.iterdir()
    mine = PrivateDirectory("test", str(tmp_path))
    assert left.exists()  # too young to be sure
    for path in (left, pathlib.Path(mine.path)):
        os.utime(path, (0, 0))
    PrivateDirectory("test", str(tmp_path)).close()
    assert not left.exists()
    assert os.path.exists(mine.path)
    mine.close()
    assert not list(tmp_path.iterdir())
