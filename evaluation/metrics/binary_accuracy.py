"""Accuracy of answers to yes-or-no questions, as ClothoAQA has them."""

import re
from collections.abc import Sequence

from evaluation.metrics.scores import Scores, check_pairs, check_strings, mean

YES, NO = "yes", "no"
# What results name.
RULE = "yes-no-1: an answer's first word where it is yes or no, else the one of both that it holds, else neither"
_WORD = re.compile(r"\w+")


def yes_or_no(answer: str) -> str | None:
    """`"yes"` or `"no"`, whatever the case, or `None` where an answer says neither or both.

    "Yes, there is no dog." says yes, "There is no dog." says no, "Nothing." says neither.
    """
    words = _WORD.findall(answer.lower())
    if words and words[0] in (YES, NO):
        return words[0]
    said = {YES, NO}.intersection(words)
    return said.pop() if len(said) == 1 else None


def binary_accuracy(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """The share of answers that say what their reference says; one that says neither yes nor no is wrong.

    Args:
        predictions: one answer a sample, in free words.
        references: "yes" or "no".

    Returns:
        `details` count the answers that say neither, as `undecided`.

    Raises:
        ValueError: other than one reference a prediction, no samples, or a reference that is neither "yes" nor "no".
    """
    check_pairs(predictions, references)
    check_strings("predictions", predictions)
    check_strings("references", references)
    for place, reference in enumerate(references):
        if reference not in (YES, NO):
            raise ValueError(f"references[{place}] is {reference!r}, expected {YES!r} or {NO!r}.")
    said = [yes_or_no(answer) for answer in predictions]
    right = tuple(float(own == other) for own, other in zip(said, references, strict=True))
    return Scores("binary_accuracy", mean(right), right, {"rule": RULE, "undecided": said.count(None)})
