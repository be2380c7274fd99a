"""Measures every op against its rivals on this machine: ``python -m benchmarks``. See docs/benchmarks.md."""
