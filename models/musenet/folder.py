"""A folder of MIDI files as pieces to train on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path

from rich.progress import track

from ..atomic import replacing, writable
from .data import HELD_OUT, Piece, cache_directory
from .midi import Music, read_midi
from .tokens import GENERAL, TICKS_PER_BEAT, Note, Tempo, Vocabulary

#: More files than this are parsed in several processes; for fewer, starting those takes longer than it saves.
PARSED_ALONE = 200


def midi_files(folder: Path) -> list[Path]:
    """The MIDI files in a folder and in those below it, always in the same mixed order.

    Raises:
        ValueError: if there is no such folder, or no file in it that ends in ``.mid`` or ``.midi``.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'is no folder' if folder.exists() else 'there is no such folder'}")
    files = [path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi") and path.is_file()]
    if not files:
        raise ValueError(f"{folder}: there is no MIDI file in it (.mid or .midi)")
    return sorted(files, key=lambda path: (_place(folder, path), path))


def vocabulary_of(folder: Path) -> Vocabulary:
    """The general vocabulary, with a composer for every folder in ``folder`` that has MIDI files in it or below it."""
    composers = {name for path in midi_files(folder) if (name := _composer(folder, path)) is not None}
    return replace(GENERAL, composers=tuple(sorted(composers)))


def read_folder(
    folder: Path,
    limit: int | None = None,
    *,
    strict: bool = False,
    processes: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Piece]:
    """Yield the pieces of a folder of MIDI files, one after the other, as all may not fit in memory.

    A piece's composer is the folder in ``folder`` that it is in or below, if it is in one. Held out is one file in ten,
    decided by its name and by nothing else; if that would be none or all, only the first. Of files with the same
    content, the first is taken.

    Parsed music is kept in :func:`cache_directory`, by the file's content.

    Args:
        limit: how many files to take; all by default.
        strict: whether a file that can't be read or has nothing to play is an error, and not passed over.
        say: is told of each file that is passed over, and in the end how many were.

    Raises:
        ValueError: if there is no folder, no MIDI file in it or none with anything to play, one can't be read in
            ``strict``, ``limit`` is not positive, or the cache lacks pieces and can't be written.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 piece, got {limit}")
    files = midi_files(folder)[:limit]
    kept: dict[Path, Path] = {}  # file to its place in the cache, one of each content
    version = importlib.metadata.version("symusic")
    cache = cache_directory() / "midi" / f"symusic-{version}-grid-{TICKS_PER_BEAT}"
    unread: dict[Path, str] = {}
    seen: set[Path] = set()
    for path in files:
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            unread[path] = f"{path}: can't be read ({error.strerror})"
            continue
        place = cache / digest[:2] / f"{digest}.json"
        if place not in seen:
            kept[path] = place
        seen.add(place)
    missing = [path for path, place in kept.items() if not place.exists()]
    if missing:
        writable(kept[missing[0]])
    unread |= _parse_all(missing, [kept[path] for path in missing], processes)
    if strict and unread:
        raise ValueError(next(iter(unread.values())))
    for reason in unread.values():
        say(f"passed over {reason}")
    playable = {path: place for path, place in kept.items() if path not in unread}
    if not playable:
        raise ValueError(f"{folder}: none of its {len(files)} MIDI files can be played")
    copies = len(files) - len(playable) - len(unread)
    say(
        f"{len(playable)} MIDI files in {folder}; {len(unread)} passed over as they can't be played, "
        f"{copies} as copies of others"
    )
    held_out = [path for path in playable if _place(folder, path) % HELD_OUT == 0]
    if len(held_out) in (0, len(playable)):
        held_out = [next(iter(playable))]
    for path, place in playable.items():
        music = _cached(place)
        if music is None:  # damaged: once more
            _parse(path, place)
            music = _cached(place)
            assert music is not None
        name = path.relative_to(folder).as_posix()
        yield Piece(name, tuple(music.notes), path in held_out, tuple(music.tempos), _composer(folder, path))


def _place(folder: Path, path: Path) -> int:
    """A number that is as good as drawn, yet the same on every machine."""
    return zlib.crc32(path.relative_to(folder).as_posix().encode())


def _composer(folder: Path, path: Path) -> str | None:
    parts = path.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else None


def _parse_all(files: list[Path], places: list[Path], processes: int) -> dict[Path, str]:
    """Put files into their places in the cache; which of them can't be read, and why."""
    with ExitStack() as stack:
        results: Iterator[str | None] = map(_reason, files, places)
        if len(files) > PARSED_ALONE:
            # Not forked: this process may have threads by now, and a fork keeps their locks without them.
            spawning = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=spawning))
            results = pool.map(_reason, files, places, chunksize=32)
        found = track(results, "Reading MIDI files", len(files), transient=True) if files else results
        return {path: reason for path, reason in zip(files, found) if reason is not None}


def _reason(path: Path, place: Path) -> str | None:
    """Why a file can't be put into the cache; None once it is there."""
    try:
        _parse(path, place)
    except ValueError as error:
        return str(error)
    return None


def _parse(path: Path, place: Path) -> None:
    music = read_midi(path, GENERAL.instruments)
    content = {"notes": [astuple(note) for note in music.notes], "tempos": [astuple(tempo) for tempo in music.tempos]}
    with replacing(place) as temporary:
        temporary.write_text(json.dumps(content))


def _cached(place: Path) -> Music | None:
    """What the cache has; None if it is damaged."""
    try:
        content = json.loads(place.read_text())
        return Music([Note(*note) for note in content["notes"]], [Tempo(*tempo) for tempo in content["tempos"]])
    except (OSError, ValueError, TypeError, KeyError):
        return None
