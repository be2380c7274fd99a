"""Everything that needs a GPU, in one go: ``make gpu``, which is ``python -m benchmarks.gpu``.

Builds for CUDA in place, then checks, tests and measures, in whatever Python it is started with; it installs nothing,
and imports no more than torch. A step that fails, or lacks what it needs, is told at the end and stops no other.

``steps`` says what is run, ``running`` runs one within its time, ``reports`` reads what it wrote, ``ending`` makes the
tables.
"""
