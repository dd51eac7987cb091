"""What Dask sees: arrays to read at one snapshot, arrays to write in one save."""
