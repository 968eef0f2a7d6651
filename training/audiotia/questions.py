"""Question answering data sets in their official formats: the sound is replaced by a caption of its clip.

Formats: OpenAQA (Gong et al., 2024) as the LTU repository links it, MusicQA (Liu et al., 2024) as on the Hub, ClothoAQA
(Lipping et al., 2022) as on Zenodo.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.audiotia import templates
from training.audiotia.clip_captions import ClipCaptions
from training.audiotia.examples import Example, Turn
from training.audiotia.reader import RecordReader, Table, Tally, found_by

TASKS = ("AQA", "CAP", "CLS")


@dataclass(frozen=True, kw_only=True)
class QuestionReader(RecordReader):
    """Records with questions about clips.

    Args:
        captions (`tuple[Table, ...]`): caption files by which sounds are replaced, see `ClipCaptions`.
    """

    captions: tuple[Table, ...] = field(default=(), metadata=found_by("find_tables"))

    def clip_captions(self) -> ClipCaptions:
        return ClipCaptions(self.captions, self.encoding)

    def description(self, captions: ClipCaptions, clip: str, question: str, record: dict[str, Any]) -> str | None:
        """The record's own caption or one of the clip's, `None` if there is none."""
        return (record.get("caption") or "").strip() or captions.choose(clip, question, self.youtube)

    @property
    def needs_captions(self) -> bool:
        """Whether a description must be looked for."""
        return True

    def check(self) -> None:
        super().check()
        for path in self.path if self.needs_captions else ():
            if not self.captions and "caption" not in next(self.records(path)):
                raise ValueError(
                    f"The source {self.name!r} needs the option captions: {path} has no captions to replace sounds by."
                )


@dataclass(frozen=True, kw_only=True)
class OpenAqa(QuestionReader):
    """OpenAQA: a list of `{instruction, input, audio_id, dataset, task, output}`, gigabytes of it.

    Args:
        task (`str`): `"AQA"` takes the questions as they are. `"CAP"` takes each answer for a caption and `"CLS"` for
            labels ("Labels: a; b"), both asked for by the paper's templates; select records of that kind with `where`.
        about (`Sequence[str]`): words, one of which an answer must have, such as those that tell music.
    """

    youtube = True
    required = frozenset({"instruction", "audio_id", "output"})
    # The data set's audio_id is the clip's place on its authors' machine; `file` is the last part of it.
    pattern = "{file}"

    task: str = "AQA"
    about: Sequence[str] = ()

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.about, str):
            raise ValueError(f"{self.name}: about is {self.about!r}, expected a list of words.")
        if self.task not in TASKS:
            raise ValueError(f"{self.name}: task is {self.task!r}, expected one of {', '.join(TASKS)}.")

    @property
    def needs_captions(self) -> bool:
        return self.task != "CAP"  # captions describe themselves

    def records(self, path: Path) -> Iterator[dict[str, Any]]:
        for record in super().records(path):
            record["file"] = record["audio_id"].rpartition("/")[2]
            yield record

    def selected(self, path: Path, tally: Tally) -> Iterator[dict[str, Any]]:
        words = re.compile(rf"\b({'|'.join(map(re.escape, self.about))})\b", re.IGNORECASE)
        for record in super().selected(path, tally):
            if not self.about or words.search(record["output"]):
                yield record
            else:
                tally.not_selected += 1

    def examples(self, tally: Tally) -> Iterator[Example]:
        captions = self.clip_captions()
        for path in self.path:
            for record in self.selected(path, tally):
                answer, clip = record["output"].strip(), self.clip(path, record)
                if self.task == "AQA":
                    turn = templates.question(record["instruction"].strip(), answer)
                elif self.task == "CAP":
                    turn = templates.captioning(answer, self.audio_type)
                else:
                    turn = templates.classification(_labels(answer))
                if not all(turn):
                    tally.incomplete += 1
                    continue
                description = answer
                if self.needs_captions:
                    description = self.description(captions, clip, turn.instruction, record)
                if description is None:
                    tally.without_description += 1
                    continue
                yield Example(description, *turn, self.task, self.audio_type, self.name, clip)


@dataclass(frozen=True, kw_only=True)
class MusicQa(QuestionReader):
    """MusicQA: a list of `{audio_name, conversation: [{from: human, value}, {from: gpt, value}, ...]}`."""

    required = frozenset({"audio_name", "conversation"})
    pattern = "{audio_name}"

    audio_type: str = "music"

    def examples(self, tally: Tally) -> Iterator[Example]:
        captions = self.clip_captions()
        for path in self.path:
            for record in self.selected(path, tally):
                clip = self.clip(path, record)
                turns = _turns(path, clip, record["conversation"])
                if not turns or not all(text for turn in turns for text in turn):
                    tally.incomplete += 1
                    continue
                description = self.description(captions, clip, turns[0].instruction, record)
                if description is None:
                    tally.without_description += 1
                    continue
                yield Example(description, *turns[0], "AQA", self.audio_type, self.name, clip, tuple(turns[1:]))


@dataclass(frozen=True, kw_only=True)
class ClothoAqa(QuestionReader):
    """ClothoAQA: `file_name,QuestionText,answer[,confidence]`, where three annotators answered each question.

    Args:
        captions (`tuple[Table, ...]`): Clotho's own caption files.
        answers (`str`): `"each"` annotator's answer is an example, or the `"majority"`'s is: the answer given most
            often, of several the first.
    """

    required = frozenset({"file_name", "QuestionText", "answer"})
    pattern = "{file_name}"

    answers: str = field(default="each")

    def __post_init__(self):
        super().__post_init__()
        if self.answers not in ("each", "majority"):
            raise ValueError(f"{self.name}: answers is {self.answers!r}, expected each or majority.")

    def examples(self, tally: Tally) -> Iterator[Example]:
        captions = self.clip_captions()
        for path in self.path:
            records = self.selected(path, tally)
            for record in records if self.answers == "each" else _majority(records):
                clip = self.clip(path, record)
                turn = templates.question(record["QuestionText"].strip(), record["answer"].strip())
                if not all(turn):
                    tally.incomplete += 1
                elif (description := self.description(captions, clip, turn.instruction, record)) is None:
                    tally.without_description += 1
                else:
                    yield Example(description, *turn, "AQA", self.audio_type, self.name, clip)


def _majority(records: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    """One record for each question about a clip, with the answer that most gave."""
    asked: dict[tuple[str, str], list[dict[str, str]]] = {}
    for record in records:
        asked.setdefault((record["file_name"], record["QuestionText"]), []).append(record)
    for answered in asked.values():
        # most_common keeps the order of equals.
        ((answer, _),) = Counter(record["answer"].strip().casefold() for record in answered).most_common(1)
        yield next(record for record in answered if record["answer"].strip().casefold() == answer)


def _labels(output: str) -> list[str]:
    labels = output.removeprefix("Labels:").removesuffix(".").split(";")
    return [label.strip() for label in labels if label.strip()]


def _turns(path: Path, clip: str, conversation: list[dict[str, str]]) -> list[Turn]:
    """The turns of a conversation in which human and gpt alternate."""
    speakers = [message["from"] for message in conversation]
    if speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError(f"{path}: in the conversation about {clip} speak {speakers}, expected human and gpt in turn.")
    values = [message["value"].strip() for message in conversation]
    return [Turn(question, answer) for question, answer in zip(values[::2], values[1::2], strict=True)]


__all__ = ["ClothoAqa", "MusicQa", "OpenAqa", "QuestionReader"]
