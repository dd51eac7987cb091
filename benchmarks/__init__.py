"""Measurements against numpy.memmap, both sides durable and in the same run: ``python benchmarks``."""
