"""Hooks into what users already run; each is imported by its own name."""
