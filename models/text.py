"""Real text that needs no download: the Python language's reference, which every Python has for its ``help()``."""

from __future__ import annotations

from functools import cache


@cache
def reference() -> bytes:
    """All of it, about half a million bytes of English with examples in Python; another one in each version."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def excerpts(count: int, length: int) -> list[bytes]:
    """Consecutive excerpts of ``length`` bytes from its beginning.

    Raises:
        ValueError: if there is less text.
    """
    text = reference()
    if count * length > len(text):
        raise ValueError(
            f"{count} × {length} bytes of text must be at most the {len(text)} that Python's reference has"
        )
    return [text[i * length : (i + 1) * length] for i in range(count)]
