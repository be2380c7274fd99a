"""What a call of an op costs before its kernel: ``python -m pytest benchmarks/dispatch``."""
