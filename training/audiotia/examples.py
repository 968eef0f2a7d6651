"""What AudioTIA consists of: (description, instruction, answer), the paper's text-only training examples.

The description is what CLAP's text tower embeds in place of a sound; the model is trained to give the answer to the
instruction. Nothing here knows audio.
"""

from dataclasses import dataclass
from typing import NamedTuple

import datasets

AUDIO_TYPES = ("sound", "music", "speech")


class Turn(NamedTuple):
    """One question and its answer."""

    instruction: str
    answer: str


@dataclass(frozen=True)
class Example:
    """One training example: a description and one or more turns about it.

    Attributes:
        description (`str`): what CLAP's text tower embeds in place of a sound.
        instruction, answer (`str`): the first turn.
        task (`str`): `"CLS"`, `"CAP"` or `"AQA"`; of drawn examples one of `ExampleMaker.TASKS`.
        audio_type (`str`): one of `AUDIO_TYPES`.
        source (`str`): name of the source in the mixture; of drawn examples, where the description came from.
        audio (`str`, *optional*): name of the clip in the source's own files, by which test clips are kept out and
            sounds are found where a model is trained on sounds.
        further_turns (`tuple[Turn, ...]`): what is asked after the first turn.
    """

    description: str
    instruction: str
    answer: str
    task: str
    audio_type: str
    source: str
    audio: str | None = None
    further_turns: tuple[Turn, ...] = ()

    def __post_init__(self):
        if self.audio_type not in AUDIO_TYPES:
            raise ValueError(f"audio_type is {self.audio_type!r}, expected one of {', '.join(AUDIO_TYPES)}.")

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, the first included."""
        return (Turn(self.instruction, self.answer), *self.further_turns)

    @property
    def length(self) -> int:
        """Characters of all instructions and answers, by which rows that need little padding can be grouped."""
        return sum(len(text) for turn in self.turns for text in turn)


EXAMPLE_FEATURES = datasets.Features(
    {
        "description": datasets.Value("string"),
        "instruction": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "task": datasets.Value("string"),
        "audio_type": datasets.Value("string"),
        "source": datasets.Value("string"),
        "audio": datasets.Value("string"),
        "further_turns": datasets.List(
            {"instruction": datasets.Value("string"), "answer": datasets.Value("string")},
        ),
    }
)

__all__ = ["AUDIO_TYPES", "EXAMPLE_FEATURES", "Example", "Turn"]
