"""The ``dask-zbig`` command: one module for each of its commands."""
