"""The data card of a mixture: what was read, what was left out and why, and whose it is; like the paper's Table S10."""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from training.audiotia.examples import Example
from training.audiotia.reader import Tally

LISTED_NAMES = 5


@dataclass
class SourceCard:
    """What one source gave.

    `read` is what its files hold: `not_selected`, `incomplete`, `without_description` and `excluded` of it were left
    out, and `share` of the rest was taken. `counts` are the rows taken by task and audio type. Exclusion lists name
    `exclusion_names` clips; `exclusion_names_unmatched` of them are not in the source, `unmatched_examples` among them.
    """

    name: str
    reader: str
    licence: str | None = None
    url: str | None = None
    share: float = 1.0
    read: int = 0
    not_selected: int = 0
    incomplete: int = 0
    without_description: int = 0
    excluded: int = 0
    taken: int = 0
    distinct_descriptions: int = 0
    exclusion_names: int = 0
    exclusion_names_unmatched: int = 0
    unmatched_examples: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def offered(self, tally: Tally, examples: int) -> None:
        """Notes the tally of a source's reader, which gave so many examples."""
        for entry in fields(tally):
            setattr(self, entry.name, getattr(tally, entry.name))
        self.read = examples + self.not_selected + self.incomplete + self.without_description

    def warnings(self) -> Iterator[str]:
        """What its user should know."""
        if not self.taken:
            yield f"{self.name}: not one of {self.read} rows was taken."
        if self.without_description:
            yield f"{self.name}: {self.without_description} of {self.read} rows have no description and were left out."
        if self.incomplete:
            yield f"{self.name}: {self.incomplete} of {self.read} rows lack a caption, a question or an answer."
        if self.exclusion_names_unmatched:
            yield (
                f"{self.name}: {self.exclusion_names_unmatched} of {self.exclusion_names} names to exclude are not in "
                f"the source, such as {', '.join(self.unmatched_examples)}."
            )


@dataclass
class DataCard:
    """What a mixture gave, source by source. It names no folder of the machine."""

    seed: int = 0
    sources: list[SourceCard] = field(default_factory=list)
    distinct_descriptions: int = 0

    @property
    def rows(self) -> int:
        return sum(source.taken for source in self.sources)

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Rows taken by task and audio type."""
        totals: dict[str, Counter[str]] = {}
        for source in self.sources:
            for task, counts in source.counts.items():
                totals.setdefault(task, Counter()).update(counts)
        return {task: dict(counts) for task, counts in totals.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "totals": self.totals, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "DataCard":
        sources = [SourceCard(**source) for source in content["sources"]]
        return cls(content["seed"], sources, content["distinct_descriptions"])

    def to_markdown(self) -> str:
        """Three tables: the sources, the totals, the licences."""
        head = "Source|Task|Audio|Read|Not selected|Incomplete|No description|Excluded|Share|Taken|Descriptions"
        rows = [
            (
                source.name,
                ", ".join(source.counts) or "-",
                ", ".join(dict.fromkeys(kind for counts in source.counts.values() for kind in counts)) or "-",
                source.read,
                source.not_selected,
                source.incomplete,
                source.without_description,
                source.excluded,
                f"{source.share:g}",
                source.taken,
                source.distinct_descriptions,
            )
            for source in self.sources
        ]
        rows.append(("**all**", *[""] * 8, self.rows, self.distinct_descriptions))
        totals = [(task, kind, count) for task, counts in self.totals.items() for kind, count in counts.items()]
        licences = [(source.name, source.licence or "not stated", source.url or "") for source in self.sources]
        parts = [
            _table(head.split("|"), rows),
            _table(["Task", "Audio", "Rows"], totals),
            _table(["Source", "Licence", "From"], licences),
        ]
        notes = [f"- {note}" for source in self.sources for note in source.warnings()]
        return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])]) + "\n"


class Counting:
    """Fills a source's card while its rows go by.

    Different descriptions are counted by their hashes, 8 bytes a row: the texts of millions of rows are not kept.
    """

    def __init__(self, card: SourceCard):
        self.card = card
        self.hashes = array("q")
        self._counts: Counter[tuple[str, str]] = Counter()

    def take(self, example: Example) -> None:
        self.hashes.append(hash(example.description))
        self._counts[example.task, example.audio_type] += 1

    def finish(self) -> None:
        self.card.taken = len(self.hashes)
        self.card.distinct_descriptions = count_distinct([self.hashes])
        for (task, audio_type), count in self._counts.items():
            self.card.counts.setdefault(task, {})[audio_type] = count


def count_distinct(hashes: Sequence[array]) -> int:
    """How many different hashes there are."""
    parts = [np.frombuffer(part, dtype=np.int64) for part in hashes if part]
    if not parts:
        return 0
    values = np.concatenate(parts)
    values.sort()  # in place: np.unique would take several times the memory
    return 1 + int(np.count_nonzero(values[1:] != values[:-1]))


def _table(head: list[str], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


__all__ = ["Counting", "DataCard", "SourceCard", "count_distinct"]
