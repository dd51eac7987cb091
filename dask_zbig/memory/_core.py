"""Finding the compiled core.

In an installed package it lies beside this file. But whoever starts Python in the root of a clone gets the source
tree's package, which has none, instead of the one that was installed: then the installed core is used.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType

__all__ = ["ffi", "lib"]

_NAME = "dask_zbig.memory._zbig"


def _installed() -> ModuleType:
    try:
        files = importlib.metadata.distribution("dask_zbig").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.startswith("_zbig.") and file.name.endswith(".so"):
            spec = importlib.util.spec_from_file_location(_NAME, str(file.locate()))
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                sys.modules[_NAME] = module
                return module
    raise ImportError(f"the compiled core {_NAME} is not there: install dask_zbig first, by `pip install .`")


try:
    from dask_zbig.memory import _zbig as core
except ImportError as e:
    if e.name not in (_NAME, "dask_zbig.memory"):
        raise
    core = _installed()

ffi = core.ffi
lib = core.lib

# cffi makes a type when it is first used. If the garbage collector comes in just then and lets another thread run,
# which uses the type too, that ends the process (its issue 271); and loaders are four threads that begin with the same
# call. So all types are made here, where no other thread can be.
for _name in ffi.list_types()[0]:
    with contextlib.suppress(TypeError):  # it is opaque
        ffi.new(f"{_name} *")
for _name in dir(lib):
    getattr(lib, _name)
