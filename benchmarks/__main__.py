"""``python -m benchmarks`` or ``python benchmarks``, from the repository's root."""

import os
import sys

# What is measured is what is installed: the source tree, whose dask_zbig is not compiled, comes last.
_here = os.path.dirname(os.path.abspath(__file__))
_root = os.path.dirname(_here)
sys.path[:] = [*(p for p in sys.path if os.path.abspath(p or ".") not in (_here, _root)), _root]

from benchmarks.program import main  # noqa: E402 (after the path is right)

if __name__ == "__main__":
    main()
