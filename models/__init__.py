"""The reference models: run from a checkout with ``python -m models``, not installed."""
