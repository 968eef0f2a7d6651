"""MMAU's own rule for whether an answer in free words picks the right option.

Sakshi et al., "MMAU: A Massive Multi-Task Audio Understanding and Reasoning Benchmark", ICLR 2025. The rule is that of
the benchmark's `evaluation.py`, on which its published scores rest, quirks and all: the order of words and how often
one is said count for nothing, "not a dog" names "a dog", and a word that only a wrong option has spoils the answer
wherever it stands.
"""

import re
from collections.abc import Sequence

from evaluation.metrics.scores import Scores, check_pairs, check_strings, mean

# What results name.
RULE = "mmau-string-match-1: all words of the right option, and none that only wrong options have"
_WORD = re.compile(r"\w+")


def matches(prediction: str, reference: str, choices: Sequence[str]) -> bool:
    """Whether an answer holds every word of the right option and no word that only other options have.

    Words are runs of letters, digits and underscores, in lower case.

    Args:
        prediction: the answer.
        reference: the right option.
        choices: all options. Those with the words of the right one, and that itself, are no wrong ones.
    """
    said, right = _words(prediction), _words(reference)
    wrong = {word for choice in choices for word in _words(choice)} - right
    return bool(said) and right <= said and not said & wrong


def mmau_string_match(
    predictions: Sequence[str], references: Sequence[str], choices: Sequence[Sequence[str]]
) -> Scores:
    """The share of answers that match the right option.

    Args:
        predictions: one answer a sample, in free words.
        references: the right option's text.
        choices: the texts of all options of each sample.

    Returns:
        `details` count the samples whose right option is not among the options, as `reference_not_a_choice`; the rule
        works on them too.

    Raises:
        ValueError: other than one reference and one list of options a prediction, no samples, or no options.
    """
    check_pairs(predictions, references)
    check_strings("predictions", predictions)
    check_strings("references", references)
    if len(choices) != len(predictions):
        raise ValueError(
            f"Got {len(predictions)} predictions but {len(choices)} lists of choices; they must match 1:1."
        )
    for place, options in enumerate(choices):
        if isinstance(options, str) or len(options) == 0:
            raise ValueError(f"choices[{place}] is {options!r}; expected a list of at least one option.")
        check_strings(f"choices[{place}]", options)
    right = tuple(float(matches(*sample)) for sample in zip(predictions, references, choices, strict=True))
    strangers = sum(reference not in options for reference, options in zip(references, choices, strict=True))
    return Scores("mmau_string_match", mean(right), right, {"rule": RULE, "reference_not_a_choice": strangers})


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower()))
