"""Captions as the caption metrics take them: checked, and in Penn Treebank tokens."""

from collections import Counter
from collections.abc import Sequence

from evaluation.metrics.ptb import ptb_tokenize
from evaluation.metrics.scores import check_pairs, check_strings

Tokens = tuple[str, ...]
NGram = tuple[str, ...]


def tokenize_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Checks captions and their references and takes both apart.

    A caption without words, such as an empty prediction, has no tokens and is scored like any other.

    Args:
        predictions: one caption a sample.
        references: at least one caption a sample.

    Raises:
        ValueError: other than one list of references a prediction, a sample without references, or no samples.
    """
    check_pairs(predictions, references)
    check_strings("predictions", predictions)
    for place, captions in enumerate(references):
        if isinstance(captions, str):
            raise ValueError(f"references[{place}] is the one string {captions!r}; expected a list of captions.")
        if len(captions) == 0:
            raise ValueError(f"references[{place}] is empty; expected at least one caption.")
        check_strings(f"references[{place}]", captions)
    return [ptb_tokenize(text) for text in predictions], [[ptb_tokenize(text) for text in row] for row in references]


def count_ngrams(tokens: Tokens, longest: int) -> Counter[NGram]:
    """How often each n-gram of 1 to `longest` tokens occurs."""
    return Counter(
        tokens[start : start + size] for size in range(1, longest + 1) for start in range(len(tokens) - size + 1)
    )
