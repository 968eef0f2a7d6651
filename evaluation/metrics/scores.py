"""What every metric returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scores:
    """A corpus and its sentences, scored.

    Attributes:
        name: of the metric, which is the key in `as_dict`.
        score: of the corpus; `None` where it could not be computed, and `details` say why.
        sentences: one score a prediction, in their order; `None` where one has no score. Empty where the metric scores
            no single predictions.
        details: what the score depends on, such as the tokeniser, and what there is to know beside it.
    """

    name: str
    score: float | None
    sentences: tuple[float | None, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """`{name: score, "sentences": [...], **details}`, for JSON and `evaluate`."""
        return {self.name: self.score, "sentences": list(self.sentences), **self.details}


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def check_pairs(predictions: Sequence[object], references: Sequence[object]) -> None:
    """Raises `ValueError` unless there is one reference, or one list of them, for each of at least one prediction."""
    for name, given in (("predictions", predictions), ("references", references)):
        if isinstance(given, str):
            raise ValueError(f"{name} is the one string {given!r}; expected a list with one entry a sample.")
    if len(predictions) != len(references):
        raise ValueError(f"Got {len(predictions)} predictions but {len(references)} references; they must match 1:1.")
    if len(predictions) == 0:
        raise ValueError("Got no predictions; there is nothing to score.")


def check_strings(name: str, texts: Sequence[object]) -> None:
    """Raises `ValueError` that names the first entry which is no string."""
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{place}] is {text!r} ({type(text).__name__}), expected a string.")
