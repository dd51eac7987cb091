"""Measurements against numpy.memmap and other stores, durable on both sides: ``python -m benchmarks``."""
