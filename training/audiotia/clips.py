"""Names of clips: the same clip is written with and without folder and extension, and by its YouTube id."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from training.audiotia.tables import clip_column, decoding, read_records, require_columns

AUDIO_SUFFIXES = frozenset(
    [
        ".aac",
        ".aif",
        ".aiff",
        ".au",
        ".flac",
        ".m4a",
        ".mkv",
        ".mp3",
        ".mp4",
        ".oga",
        ".ogg",
        ".opus",
        ".wav",
        ".webm",
        ".wma",
    ],
)
# A clip of a YouTube video: its id of 11 characters, often after a "Y", often before start (and end) in seconds.
_YOUTUBE = re.compile(r"Y?([\w-]{11})(?:_\d+(?:\.\d+)?){0,2}", re.ASCII)


def clip_parts(name: str) -> tuple[str, ...]:
    """The folders and the stem of a clip's name; only a known audio extension is taken off."""
    *folders, file = name.strip().replace("\\", "/").split("/")
    stem, dot, suffix = file.rpartition(".")
    if stem and dot + suffix.lower() in AUDIO_SUFFIXES:
        file = stem
    return (*(folder for folder in folders if folder not in ("", ".")), file)


def youtube_id(stem: str) -> str | None:
    """The YouTube id in names such as `rZ4d8p0hAfI`, `YrZ4d8p0hAfI` and `rZ4d8p0hAfI_30.000_40.000`."""
    found = _YOUTUBE.fullmatch(stem)
    return found[1] if found else None


class ClipIndex:
    """Values by names of clips, found under any way to write the name.

    Two names are of the same clip where their stems are equal and their folders do not differ: `test/dog_1.wav` is
    `dog_1` and `data/test/dog_1.flac`, and is not `train/dog_1.wav`.
    """

    def __init__(self, items: Iterable[tuple[str, str]] = ()):
        self._by_stem: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        self._by_youtube_id: dict[str, list[str]] = {}
        for name, value in items:
            self.add(name, value)

    def __len__(self) -> int:
        return len(self._by_stem)

    def add(self, name: str, value: str) -> None:
        *folders, stem = clip_parts(name)
        self._by_stem.setdefault(stem, []).append((tuple(folders), value))
        if video := youtube_id(stem):
            self._by_youtube_id.setdefault(video, []).append(value)

    def find(self, name: str, youtube: bool = False) -> list[str]:
        """The values of a clip, in order.

        Args:
            name (`str`)
            youtube (`bool`): the clip may come from YouTube; where its name is not found, its video's id is looked for.
        """
        *folders, stem = clip_parts(name)
        values = [
            value for other, value in self._by_stem.get(stem, ()) if all(map(str.__eq__, other[::-1], folders[::-1]))
        ]
        if values or not youtube or (video := youtube_id(stem)) is None:
            return values
        return self._by_youtube_id.get(video, [])


def read_clip_names(path: Path, column: str | None = None, encoding: str = "utf-8-sig") -> list[str]:
    """The clips that a list names.

    Args:
        path (`Path`): a text file with a name a line; a CSV, JSON or JSONL table with a column of names; or JSON lists
            of names, also grouped in an object (WavCaps' blacklists).
        column (`str`, *optional*): the table's column; by default the first of `tables.CLIP_COLUMNS` that it has.
        encoding (`str`)
    """
    if path.suffix not in (".csv", ".tsv", ".json", ".jsonl"):
        with decoding(path, encoding):
            lines = path.read_text(encoding=encoding).splitlines()
        return [line.strip() for line in lines if line.strip()]
    if path.suffix == ".json":
        records = _flatten(json.loads(path.read_text(encoding=encoding)))
    else:
        records = read_records(path, encoding)
    names = []
    for record in records:
        if isinstance(record, dict):
            found = column or clip_column(path, record)
            require_columns(path, record, [found])
            names.append(str(record[found]))
        else:
            names.append(str(record))
    return names


def _flatten(value: Any) -> Iterator[Any]:
    """The entries of JSON lists, however grouped; an object without lists is an entry itself."""
    if isinstance(value, dict) and any(isinstance(inner, list) for inner in value.values()):
        value = [entry for inner in value.values() if isinstance(inner, list) for entry in inner]
    if isinstance(value, list):
        for entry in value:
            yield from [entry] if isinstance(entry, dict) else _flatten(entry)
    else:
        yield value


__all__ = ["AUDIO_SUFFIXES", "ClipIndex", "clip_parts", "read_clip_names", "youtube_id"]
