"""Examples drawn by seed from captions and from descriptions of labels: what a small model can learn from.

The paper's data teach a large language model to answer freely. A small one, trained from nothing, needs many short
questions about few sources instead: what makes this sound, is it a dog, is it a dog or a rooster, how many are there.
"""

import csv
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from training.audiotia.examples import Example, Turn
from training.audiotia.reader import Reader, Tally, found_by
from training.music import Composer, Instruments


class DescribedLabel(NamedTuple):
    """A label and one of its descriptions."""

    label: str
    description: str


def read_captions(path: Path, column: str = "caption") -> list[str]:
    """The captions of a CSV file (AudioCaps, MusicCaps), stripped, in order; repeated ones once."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if column not in (reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}, expected one called {column!r}.")
        return list(dict.fromkeys(caption for row in reader if (caption := row[column].strip())))


def first_sentence(text: str) -> str:
    """The text up to its first full stop: MusicCaps' captions run to a dozen sentences, a small model to one."""
    head, stop, _ = text.partition(". ")
    return head + "." if stop else text


def as_sentence(caption: str) -> str:
    """AudioCaps' captions end with and without a full stop; an answer ends with one."""
    return caption if caption.endswith((".", "!", "?")) else caption + "."


def read_sources(questions: Path) -> dict[str, str]:
    """The noun phrase of each label, such as "a violin", out of a `questions.yaml`."""
    return yaml.safe_load(Path(questions).read_text(encoding="utf-8"))["sources"]


@dataclass(frozen=True)
class LabelTexts:
    """What is known of labels: descriptions of what one hears, noun phrases, questions, and which labels are music.

    `groups` lists labels that name one source; each label is in exactly one group.
    """

    descriptions: Mapping[str, Sequence[str]]
    sources: Mapping[str, str]
    questions: Mapping[str, Sequence[str]]
    music: frozenset[str]
    groups: Sequence[frozenset[str]]

    @classmethod
    def load(cls, descriptions: Path, questions: Path) -> "LabelTexts":
        """Reads `descriptions.yaml` and `questions.yaml`, which must speak of the same labels."""
        described = yaml.safe_load(Path(descriptions).read_text(encoding="utf-8"))
        asked = yaml.safe_load(Path(questions).read_text(encoding="utf-8"))
        if odd := sorted(set(described["descriptions"]) ^ set(asked["sources"])):
            raise ValueError(f"{descriptions} and {questions} do not name the same labels: {', '.join(odd)}.")
        groups = [frozenset(group) for group in described.get("synonyms", [])]
        grouped = set().union(*groups)
        groups += [frozenset([label]) for label in described["descriptions"] if label not in grouped]
        return cls(described["descriptions"], asked["sources"], asked["questions"], frozenset(asked["music"]), groups)

    def synonyms(self, label: str) -> frozenset[str]:
        """The labels of the same source, the label itself included."""
        return next(group for group in self.groups if label in group)


class ExampleMaker:
    """Draws examples by seed.

    Args:
        labels (`LabelTexts`)
        captions (`Mapping[str, Sequence[str]]`): captions by source; the source `"musiccaps"` is music.
        label_counts (`Mapping[str, int]`): how often CLAP heard each label. Labels are drawn by the square root of it,
            so that the language model expects what its ears can tell, without forgetting the rare.
        shares (`Mapping[str, float]`): relative frequency of each task, see `TASKS`.
        seed (`int`)
        composer (`Composer`, *optional*): of pieces of music, for the task `piece`.
    """

    TURNS = ("source", "label", "yes_no", "choice", "music_yes_no", "caption")
    TASKS = (*TURNS, "music_caption", "two_sources", "count", "piece", "conversation")

    def __init__(
        self,
        labels: LabelTexts,
        captions: Mapping[str, Sequence[str]],
        label_counts: Mapping[str, int],
        shares: Mapping[str, float],
        seed: int,
        composer: Composer | None = None,
    ):
        if unknown := sorted(set(shares) - set(self.TASKS)):
            raise ValueError(f"Unknown tasks: {', '.join(unknown)}; expected {', '.join(self.TASKS)}.")
        if "piece" in shares and composer is None:
            raise ValueError("The task piece needs instruments.")
        self.composer = composer
        self.labels = labels
        self.captions = {source: list(texts) for source, texts in captions.items()}
        self.names = sorted(labels.descriptions)
        self.weights = [math.sqrt(label_counts.get(name, 0) + 1) for name in self.names]
        self.shares = dict(shares)
        self.random = random.Random(seed)

    def draw(self, count: int) -> Iterator[Example]:
        """`count` examples, a function of the seed alone."""
        tasks, shares = list(self.shares), list(self.shares.values())
        for task in self.random.choices(tasks, shares, k=count):
            yield getattr(self, f"_{task}")()

    def _about_label(self, task: str) -> Example:
        described = self._described_label()
        return self._labelled(described, (self._turn(task, described),), task)

    def _labelled(self, described: DescribedLabel, turns: tuple[Turn, ...], task: str) -> Example:
        audio_type = "music" if described.label in self.labels.music else "sound"
        return _example(described.description, turns, task, audio_type, "labels")

    def _source(self) -> Example:
        return self._about_label("source")

    def _label(self) -> Example:
        return self._about_label("label")

    def _yes_no(self) -> Example:
        return self._about_label("yes_no")

    def _choice(self) -> Example:
        return self._about_label("choice")

    def _conversation(self) -> Example:
        """Two or three questions about one sound."""
        described = self._described_label()
        tasks = self.random.choices(self.TURNS, k=self.random.choice([2, 3]))
        turns = tuple(self._turn(task, described) for task in tasks)
        return self._labelled(described, turns, "conversation")

    def _music_yes_no(self) -> Example:
        if self.random.random() < 0.25:
            description = first_sentence(self.random.choice(self.captions["musiccaps"]))
            turn = Turn(self._question("music_yes_no"), "Yes, it is music.")
            return _example(description, (turn,), "music_yes_no", "music", "musiccaps")
        # Two draws where the first is no music, so that yes and no come about as often.
        described = self._described_label()
        if described.label not in self.labels.music:
            described = self._described_label()
        return self._labelled(described, (self._turn("music_yes_no", described),), "music_yes_no")

    def _two_sources(self) -> Example:
        pair = self._pair()
        if pair is None:
            return self._source()
        if self.random.random() < 0.5:
            turn = Turn(self._question("label"), ", ".join(described.label for described in pair))
        else:
            turn = Turn(self._question("source"), as_sentence(_capitalised(self._both(pair))))
        return self._about_pair(pair, turn, "two_sources")

    def _count(self) -> Example:
        """How many sources there are: one or two."""
        question = self._question("count")
        pair = self._pair() if self.random.random() < 0.5 else None
        if pair is None:
            described = self._described_label()
            turn = Turn(question, f"One, {self.labels.sources[described.label]}.")
            return self._labelled(described, (turn,), "count")
        return self._about_pair(pair, Turn(question, f"Two, {self._both(pair)}."), "count")

    def _pair(self) -> tuple[DescribedLabel, DescribedLabel] | None:
        """Two sources; none where the draw gives the same one twice."""
        first, second = self._described_label(), self._described_label()
        return None if second.label in self.labels.synonyms(first.label) else (first, second)

    def _both(self, pair: tuple[DescribedLabel, DescribedLabel]) -> str:
        return " and ".join(self.labels.sources[described.label] for described in pair)

    def _about_pair(self, pair: tuple[DescribedLabel, DescribedLabel], turn: Turn, task: str) -> Example:
        joint = self.random.choice(["and", "while", "as"])
        description = f"{pair[0].description.rstrip('.')} {joint} {_uncapitalised(pair[1].description)}"
        audio_type = "music" if {described.label for described in pair} <= self.labels.music else "sound"
        return _example(description, (turn,), task, audio_type, "label pairs")

    def _piece(self) -> Example:
        """A piece of music, told in other words or by its instruments."""
        piece = self.composer.draw(self.random)
        description, labels = self.composer.tell(piece, self.random), list(dict.fromkeys(piece.labels))
        form = self.random.choice(["music_caption", "caption", "source", "label"])
        if form == "label":
            answer = ", ".join(labels)
        elif form == "source":
            answer = as_sentence(_capitalised(" and ".join(self.labels.sources[label] for label in labels)))
        else:
            answer = self.composer.tell(piece, self.random)
        return _example(description, (Turn(self._question(form), answer),), "piece", "music", "pieces")

    def _caption(self) -> Example:
        others = [source for source in self.captions if source != "musiccaps"]
        source = self.random.choice([*others, "labels"])
        if source == "labels":
            return self._about_label("caption")
        caption = self.random.choice(self.captions[source])
        return _example(caption, (Turn(self._question("caption"), as_sentence(caption)),), "caption", "sound", source)

    def _music_caption(self) -> Example:
        caption = first_sentence(self.random.choice(self.captions["musiccaps"]))
        turn = Turn(self._question("music_caption"), as_sentence(caption))
        return _example(caption, (turn,), "music_caption", "music", "musiccaps")

    def _turn(self, task: str, described: DescribedLabel) -> Turn:
        """A question of a task about a described label, and the true answer."""
        label, source = described.label, self.labels.sources[described.label]
        question = self._question(task)
        if task == "label":
            return Turn(question, label)
        if task == "source":
            return Turn(question, as_sentence(_capitalised(source)))
        if task == "caption":
            # Another description of the same label: what was heard, not the wording, is to be told.
            return Turn(question, self.random.choice(self.labels.descriptions[label]))
        if task == "music_yes_no":
            return Turn(question, f"{'Yes' if label in self.labels.music else 'No'}, it is {source}.")
        if task == "yes_no":
            truth = self.random.random() < 0.5
            asked = label if truth else self._other_label(label)
            question = question.format(source=self.labels.sources[asked])
            return Turn(question, f"{'Yes' if truth else 'No'}, it is {source}.")
        options = [label]
        for _ in range(self.random.choice([1, 2, 3])):
            options.append(self._other_label(*options))
        self.random.shuffle(options)
        phrases = [self.labels.sources[option] for option in options]
        listed = ", ".join(phrases[:-1]) + " or " + phrases[-1]
        return Turn(question.format(options=listed), as_sentence(_capitalised(source)))

    def _described_label(self) -> DescribedLabel:
        (label,) = self.random.choices(self.names, self.weights)
        return DescribedLabel(label, self.random.choice(self.labels.descriptions[label]))

    def _other_label(self, *labels: str) -> str:
        taken = set().union(*(self.labels.synonyms(label) for label in labels))
        while (other := self.random.choice(self.names)) in taken:
            pass
        return other

    def _question(self, task: str) -> str:
        questions = self.labels.questions[task]
        # The first is the paper's instruction, drawn as often as all others together where there is one.
        if task in ("caption", "music_caption", "label") and self.random.random() < 0.5:
            return questions[0]
        return self.random.choice(questions)


def count_labels(metadata: Path, exclude_groups: Sequence[str] = ()) -> Counter[str]:
    """How often each label occurs in a table with the columns `label` and, if given, `group`."""
    with Path(metadata).open(newline="", encoding="utf-8") as file:
        return Counter(row["label"] for row in csv.DictReader(file) if row.get("group") not in exclude_groups)


@dataclass(frozen=True, kw_only=True)
class Drawn(Reader):
    """Examples drawn from captions and descriptions of labels, stage by stage.

    Args:
        captions (`dict[str, Path]`): AudioCaps' and MusicCaps' CSV files, or others with a column `caption`, by source.
        descriptions (`Path`): YAML of what one hears of each label, relative to the mixture's file.
        questions (`Path`): YAML of questions and noun phrases, relative to the mixture's file.
        counts (`Path`, *optional*): table with a column `label`, a row for each sound that CLAP was trained on (its
            `credits.csv`), relative to the mixture's file. Without it, labels are drawn as if CLAP had heard each as
            often.
        instruments (`Path`, *optional*): YAML of the instruments of pieces of music, relative to the mixture's file.
        stages (list of `{count, shares}`): how many examples of which tasks come one after the other.
        held_out (`int`): how many examples like those of the last stage come before all others, for evaluation.
    """

    captions: dict[str, Path] = field(metadata=found_by("find_named"))
    descriptions: Path = field(metadata=found_by("find_one", "mixture"))
    questions: Path = field(metadata=found_by("find_one", "mixture"))
    counts: Path | None = field(default=None, metadata=found_by("find_one", "mixture"))
    instruments: Path | None = field(default=None, metadata=found_by("find_one", "mixture"))
    stages: Sequence[Mapping[str, Any]]
    held_out: int = 0

    def __post_init__(self):
        super().__post_init__()
        for stage in self.stages:
            if not isinstance(stage, Mapping) or set(stage) != {"count", "shares"}:
                raise ValueError(f"The source {self.name!r} has the stage {stage!r}, expected count and shares.")
        if not self.stages:
            raise ValueError(f"The source {self.name!r} has no stages.")

    def check(self) -> None:
        for _ in self._makers():
            pass

    def examples(self, tally: Tally) -> Iterator[Example]:
        for maker, count in self._makers():
            yield from maker.draw(count)

    def _makers(self) -> Iterator[tuple[ExampleMaker, int]]:
        captions = {source: read_captions(path) for source, path in self.captions.items()}
        labels = LabelTexts.load(self.descriptions, self.questions)
        counts = count_labels(self.counts) if self.counts is not None else {}
        composer = None
        if self.instruments is not None:
            composer = Composer(Instruments.from_yaml(self.instruments), labels.sources)
        stages = [{"count": self.held_out, "shares": self.stages[-1]["shares"]}, *self.stages]
        for number, stage in enumerate(stages):
            seed = self.seed * len(stages) + number
            maker = ExampleMaker(labels, captions, counts, stage["shares"], seed, composer)
            yield maker, stage["count"]


def _example(description: str, turns: tuple[Turn, ...], task: str, audio_type: str, source: str) -> Example:
    return Example(description, *turns[0], task, audio_type, source, further_turns=turns[1:])


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _uncapitalised(text: str) -> str:
    return text[0].lower() + text[1:]


__all__ = [
    "DescribedLabel",
    "Drawn",
    "ExampleMaker",
    "LabelTexts",
    "count_labels",
    "first_sentence",
    "read_captions",
    "read_sources",
]
