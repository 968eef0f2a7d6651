"""Captions by clip, with which the sound of a question is replaced; from any caption file, one or more for a clip."""

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from training.audiotia.clips import ClipIndex
from training.audiotia.reader import Table
from training.audiotia.tables import clip_column, read_records, require_columns

CAPTION_COLUMNS = ("caption", "captions", "caption_1", "text", "description", "output")


class ClipCaptions:
    """The captions of clips.

    Args:
        tables (iterable of `Table`): caption files, in memory as long as this lives. Each is a table or a list of
            records (`.csv`, `.tsv`, `.json`, `.jsonl`) whose columns are named or known (`tables.CLIP_COLUMNS` and
            `CAPTION_COLUMNS`; Clotho's `caption_1` stands for all its five), or a JSON object of captions by clip. Of
            OpenAQA's own files the captions are read. A caption may be a text or a list of texts, or, as LP-MusicCaps
            has them, of objects with a `text` for each ten seconds.
        encoding (`str`)
    """

    def __init__(self, tables: Iterable[Table], encoding: str = "utf-8-sig"):
        self._index = ClipIndex(
            (name, caption) for table in tables for name, caption in read_clip_captions(table, encoding)
        )

    def __len__(self) -> int:
        return len(self._index)

    def choose(self, name: str, question: str, youtube: bool = False) -> str | None:
        """A caption of the clip, `None` if it has none. Which of several depends on the question alone."""
        captions = self._index.find(name, youtube)
        if not captions:
            return None
        return captions[zlib.crc32(question.encode()) % len(captions)]


def read_clip_captions(table: Table, encoding: str = "utf-8-sig") -> Iterator[tuple[str, str]]:
    """Clip and caption, for each caption of a file; see `ClipCaptions`."""
    path, clip, caption = table
    for record in _records(path, encoding):
        if not isinstance(record, dict):
            raise ValueError(f"{path} has {record!r:.80} for a record, expected an object.")
        if {"task", "output"} <= record.keys() and record["task"] != "caption":
            continue  # an OpenAQA file's other questions
        found_clip = clip or clip_column(path, record)
        found_caption = caption or _caption_column(path, record)
        require_columns(path, record, [found_clip, found_caption])
        columns = [found_caption]
        if found_caption == "caption_1":
            columns = [column for column in record if column.startswith("caption_")]
        for column in columns:
            for text in _texts(record[column]):
                yield str(record[found_clip]), text


def _records(path: Path, encoding: str) -> Iterator[Any]:
    """The records of a file; of an object of captions by clip, a record each."""
    if path.suffix != ".json" or not _is_mapping(path, encoding):
        yield from read_records(path, encoding)
        return
    content = json.loads(path.read_text(encoding=encoding))
    if "data" in content and isinstance(content["data"], list):
        yield from content["data"]
    else:
        for name, caption in content.items():
            yield {"audio_name": name, "caption": caption}


def _is_mapping(path: Path, encoding: str) -> bool:
    with path.open(encoding=encoding) as file:
        return file.read(1000).lstrip().startswith("{")


def _caption_column(path: Path, record: dict[str, Any]) -> str:
    for name in CAPTION_COLUMNS:
        if name in record:
            return name
    raise ValueError(
        f"{path} has the columns {', '.join(map(repr, record))}, none of which is known to hold captions "
        f"({', '.join(CAPTION_COLUMNS)}): name it, as in `{{path: {path.name}, caption: COLUMN}}`."
    )


def _texts(value: Any) -> Iterator[str]:
    """The texts in a caption's value, however nested."""
    if isinstance(value, str):
        if text := value.strip():
            yield text
    elif isinstance(value, dict):
        yield from _texts(value["text"] if "text" in value else list(value.values()))
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


__all__ = ["CAPTION_COLUMNS", "ClipCaptions", "read_clip_captions"]
