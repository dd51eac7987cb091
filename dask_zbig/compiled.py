"""Finding the compiled modules.

In an installed package each lies beside the module that uses it. But whoever starts Python in the root of a clone gets
the source tree's package, which has none, instead of the one that was installed: then the installed ones are used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType
from typing import Any

__all__ = ["compiled"]


def compiled(name: str) -> tuple[Any, Any]:
    """The ``ffi`` and ``lib`` of a compiled module, with all the types that it declares.

    cffi makes a type when it is first used. If the garbage collector comes in just then and lets another thread run,
    which uses the type too, that ends the process (its issue 271); and loaders are four threads that begin with one and
    the same call. So all types are made here, while the module is imported, where no other thread can be.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        if e.name != name:
            raise
        module = _installed(name)
    ffi, lib = module.ffi, module.lib
    for type_name in ffi.list_types()[0]:
        with contextlib.suppress(TypeError):  # it is opaque
            ffi.new(f"{type_name} *")
    for function in dir(lib):
        getattr(lib, function)
    return ffi, lib


def _installed(name: str) -> ModuleType:
    try:
        files = importlib.metadata.distribution("dask_zbig").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    short = name.rpartition(".")[2]
    for file in files:
        if file.name.startswith(f"{short}.") and file.name.endswith(".so"):
            spec = importlib.util.spec_from_file_location(name, str(file.locate()))
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                sys.modules[name] = module
                return module
    raise ImportError(f"the compiled module {name} is not there: install dask_zbig first, by `pip install .`")
