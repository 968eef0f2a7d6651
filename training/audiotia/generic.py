"""Tables of anyone's: columns with descriptions, instructions and answers, or with captions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.audiotia import templates
from training.audiotia.examples import Example, Turn
from training.audiotia.reader import RecordReader, Tally
from training.audiotia.tables import require_columns

ROLES = ("description", "instruction", "answer", "caption", "audio")


@dataclass(frozen=True, kw_only=True)
class GenericReader(RecordReader):
    """A `.csv`, `.tsv`, `.json` or `.jsonl` file with descriptions, instructions and answers, or with captions.

    Args:
        columns (`Mapping[str, str]`): names of the columns by role (`description`, `instruction`, `answer`,
            `caption`, `audio`) where the role is not the name. A table with `caption` and without `instruction` holds
            captions, which are description and answer; one with `caption` and `instruction` uses the caption as
            description. `audio`, the clip's name, may be missing.
        task (`str`, *optional*): by default `"CAP"` for captions and `"AQA"` otherwise.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.columns, Mapping) or not set(self.columns) <= set(ROLES):
            known = ", ".join(ROLES)
            raise ValueError(f"{self.name}: columns is {self.columns!r}, expected columns by role ({known}).")

    def column(self, role: str) -> str:
        """The column of a role."""
        return self.columns.get(role, role)

    def clip(self, path: Path, record: Mapping[str, Any]) -> str | None:
        if self.audio is not None:
            return super().clip(path, record)
        return record.get(self.column("audio"))

    def check(self) -> None:
        super().check()
        for path in self.path:
            self._read(path, next(self.records(path)))

    def examples(self, tally: Tally) -> Iterator[Example]:
        for path in self.path:
            for record in self.selected(path, tally):
                description, turn, task = self._read(path, record)
                if not all(turn):
                    tally.incomplete += 1
                elif not description:
                    tally.without_description += 1
                else:
                    clip = self.clip(path, record)
                    yield Example(description, *turn, self.task or task, self.audio_type, self.name, clip)

    def _read(self, path: Path, record: Mapping[str, Any]) -> tuple[str, Turn, str]:
        """Description, turn and task of a record."""
        captioned = self.column("caption") in record
        if captioned and self.column("instruction") not in record:
            described = "description" if self.column("description") in record else "caption"
            turn = templates.captioning(self._text(record, "caption"), self.audio_type)
            return self._text(record, described), turn, "CAP"
        source = "caption" if captioned and self.column("description") not in record else "description"
        require_columns(path, record, [self.column(role) for role in (source, "instruction", "answer")])
        turn = templates.question(self._text(record, "instruction"), self._text(record, "answer"))
        return self._text(record, source), turn, "AQA"

    def _text(self, record: Mapping[str, Any], role: str) -> str:
        return (record[self.column(role)] or "").strip()


__all__ = ["ROLES", "GenericReader"]
