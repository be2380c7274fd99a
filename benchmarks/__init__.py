"""Measures ops and models against their rivals on this machine: ``python -m benchmarks``. See docs/benchmarks.md."""
