"""Classification data sets: labels as the answer, and for a description what a language model wrote of the labels.

A source is the data set's own metadata, clip by clip with the true combinations of labels, or a list of its labels.
The descriptions are lines `{"labels": [...], "description": "..."}`, any number for a combination.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.audiotia import templates
from training.audiotia.examples import Example
from training.audiotia.reader import RecordReader, Tally, found_by
from training.audiotia.tables import read_records, require_columns

Labels = tuple[str, ...]


class LabelDescriptions:
    """Descriptions by combination of labels, whatever their order, their case or `_` for a space.

    Args:
        paths (iterable of `Path`): JSONL files of `{"labels": [...], "description": "..."}`.
    """

    def __init__(self, paths: Iterable[Path]):
        self._texts: dict[frozenset[str], list[str]] = {}
        self._turn: Counter[frozenset[str]] = Counter()
        for path in paths:
            for record in read_records(path):
                require_columns(path, record, ["labels", "description"])
                if not isinstance(record["labels"], list) or not record["labels"]:
                    raise ValueError(f"{path} has labels {record['labels']!r}, expected a list of at least one label.")
                texts = self._texts.setdefault(_key(record["labels"]), [])
                # Data sets share labels, and so a file may hold a description twice.
                if (text := record["description"].strip()) not in texts:
                    texts.append(text)

    def all(self, labels: Labels) -> list[str]:
        """All descriptions of a combination."""
        return self._texts.get(_key(labels), [])

    def next(self, labels: Labels) -> str | None:
        """The combination's descriptions in turn, `None` if it has none."""
        key = _key(labels)
        if (texts := self._texts.get(key)) is None:
            return None
        self._turn[key] += 1
        return texts[(self._turn[key] - 1) % len(texts)]

    def combinations(self) -> list[frozenset[str]]:
        """The combinations that are described, as compared."""
        return list(self._texts)


@dataclass(frozen=True, kw_only=True)
class LabelReader(RecordReader):
    """Clips with labels, each an example; or a list of labels, each description of which becomes an example.

    Args:
        path (`tuple[Path, ...]`): the data set's metadata.
        labels (`Path`): instead of `path`, the data set's labels: `{label: index}`, a JSON list or a label a line.
        descriptions (`tuple[Path, ...]`): see `LabelDescriptions`.
    """

    path: tuple[Path, ...] = field(default=(), metadata=found_by("find_all"))
    labels: Path | None = field(default=None, metadata=found_by("find_one"))
    descriptions: tuple[Path, ...] = field(default=(), metadata=found_by("find_all"))

    def __post_init__(self):
        super().__post_init__()
        if bool(self.path) == bool(self.labels):
            given = "both" if self.path else "neither"
            raise ValueError(
                f"The source {self.name!r} has {given} of path (the clips' metadata) and labels (a list of labels), "
                "expected one of them."
            )

    def labels_of(self, path: Path, record: dict[str, Any]) -> Labels:
        """The labels of a record's clip."""
        raise NotImplementedError(f"{type(self).__name__}.labels_of")

    def clips(self, tally: Tally) -> Iterator[tuple[str, Labels]]:
        """Name and labels of each clip."""
        for path in self.path:
            for record in self.selected(path, tally):
                yield self.clip(path, record), self.labels_of(path, record)

    def combinations(self) -> Counter[Labels]:
        """The different combinations of labels, of which descriptions are wanted, and how many clips have each."""
        if self.labels is not None:
            return Counter((label,) for label in read_labels(self.labels, self.encoding))
        return Counter(labels for _, labels in self.clips(Tally()) if labels)

    def check(self) -> None:
        super().check()
        for path in self.path:
            self.labels_of(path, next(self.records(path)))
        if not self.descriptions:
            raise ValueError(f"The source {self.name!r} lacks the option descriptions, a JSONL file of labels' texts.")
        if self.labels is not None:
            read_labels(self.labels, self.encoding)

    def examples(self, tally: Tally) -> Iterator[Example]:
        descriptions = LabelDescriptions(self.descriptions)
        if self.labels is not None:
            yield from self._examples_of_list(descriptions, tally)
            return
        for clip, labels in self.clips(tally):
            if not labels:
                tally.incomplete += 1
            elif (description := descriptions.next(labels)) is None:
                tally.without_description += 1
            else:
                yield self._example(description, labels, clip)

    def _examples_of_list(self, descriptions: LabelDescriptions, tally: Tally) -> Iterator[Example]:
        names = {_normalised(label): label for label in read_labels(self.labels, self.encoding)}
        described = set()
        for combination in descriptions.combinations():
            if combination <= names.keys():
                # In the order of the list: which of the labels a description names first means nothing.
                labels = tuple(label for normalised, label in names.items() if normalised in combination)
                described |= combination
                for description in descriptions.all(labels):
                    yield self._example(description, labels, None)
        tally.without_description += len(names.keys() - described)

    def _example(self, description: str, labels: Labels, clip: str | None) -> Example:
        turn = templates.classification(labels)
        return Example(description, *turn, "CLS", self.audio_type, self.name, clip)


def read_labels(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """The labels of a list: JSON `{label: index}` in the order of the indices, a JSON list, or a label a line."""
    text = path.read_text(encoding=encoding)
    if path.suffix == ".json":
        content = json.loads(text)
        if isinstance(content, dict):
            return sorted(content, key=content.__getitem__)
        if isinstance(content, list) and all(isinstance(label, str) for label in content):
            return content
        raise ValueError(f"{path} holds neither {{label: index}} nor a list of labels.")
    return [line.strip() for line in text.splitlines() if line.strip()]


def spaced(label: str) -> str:
    """`dog_bark` as one writes it: `dog bark`."""
    return label.replace("_", " ").strip()


def _normalised(label: str) -> str:
    return " ".join(label.replace("_", " ").split()).casefold()


def _key(labels: Sequence[str]) -> frozenset[str]:
    return frozenset(map(_normalised, labels))


__all__ = ["LabelDescriptions", "LabelReader", "Labels", "read_labels", "spaced"]
