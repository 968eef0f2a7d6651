"""Tables as their data sets publish them: CSV with and without a header, JSON, JSONL. Errors name file and columns."""

import contextlib
import csv
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from training.audiotia.json_stream import iterate_json

# How data sets call the column that names the clip; the first that a table has is taken.
CLIP_COLUMNS = (
    "audio_name",
    "file_name",
    "filename",
    "Filename",
    "audio_id",
    "youtube_id",
    "ytid",
    "audio",
    "fname",
    "slice_file_name",
    "wav",
    "path",
    "id",
)


def read_table(
    path: Path, columns: Sequence[str] | None = None, delimiter: str = ",", encoding: str = "utf-8-sig"
) -> Iterator[dict[str, str]]:
    """The rows of a delimited table.

    Args:
        path (`Path`)
        columns (`Sequence[str]`, *optional*): names of the columns of a table without a header.
        delimiter (`str`)
        encoding (`str`)

    Raises:
        ValueError: for a row of another width than the header, or another encoding.
    """
    # In tables separated by tabs a quote is a quote.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with decoding(path, encoding), path.open(newline="", encoding=encoding) as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
        names = list(columns) if columns is not None else [name.strip() for name in next(reader, [])]
        for row in reader:
            if len(row) != len(names):
                if not row:
                    continue
                raise ValueError(
                    f"{path}, line {reader.line_num}, has {len(row)} fields, expected {len(names)}: {names}."
                )
            yield dict(zip(names, row, strict=True))


def read_records(path: Path, encoding: str = "utf-8-sig") -> Iterator[Any]:
    """The records of a `.csv`, `.tsv`, `.json` (a list, or an object with a list `data`) or `.jsonl` file, one by one.

    Raises:
        ValueError: for another kind of file, a malformed one or another encoding.
    """
    match path.suffix:
        case ".csv":
            yield from read_table(path, encoding=encoding)
        case ".tsv":
            yield from read_table(path, delimiter="\t", encoding=encoding)
        case ".json":
            with decoding(path, encoding):
                yield from iterate_json(path, encoding)
        case ".jsonl":
            with decoding(path, encoding), path.open(encoding=encoding) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        try:
                            yield json.loads(line)
                        except json.JSONDecodeError as error:
                            raise ValueError(f"{path}, line {number}, is not valid JSON: {error}.") from None
        case _:
            raise ValueError(f"{path}: expected a .csv, .tsv, .json or .jsonl file.")


@contextlib.contextmanager
def decoding(path: Path, encoding: str) -> Iterator[None]:
    """Tells which file is in another encoding."""
    try:
        yield
    except UnicodeError as error:
        raise ValueError(
            f"{path} is not in {encoding} ({error}): name its encoding, as in `encoding: cp1252`."
        ) from None


def require_columns(path: Path, found: Iterable[str], expected: Collection[str]) -> None:
    """Raises a ValueError that names the columns where one of those expected is missing."""
    found = list(found)
    if missing := [name for name in expected if name not in found]:
        raise ValueError(
            f"{path} has the columns {', '.join(map(repr, found)) or '(none)'}; expected "
            f"{', '.join(map(repr, expected))}; missing: {', '.join(map(repr, missing))}."
        )


def clip_column(path: Path, found: Iterable[str]) -> str:
    """The column that names the clip, see `CLIP_COLUMNS`."""
    found = list(found)
    for name in CLIP_COLUMNS:
        if name in found:
            return name
    raise ValueError(
        f"{path} has the columns {', '.join(map(repr, found)) or '(none)'}, none of which is known to name clips "
        f"({', '.join(CLIP_COLUMNS)}): name it, as in `{{path: {path.name}, clip: COLUMN}}`."
    )


__all__ = ["CLIP_COLUMNS", "clip_column", "decoding", "read_records", "read_table", "require_columns"]
