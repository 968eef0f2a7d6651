"""ROUGE-L as coco-caption computes it, which is not what the package `rouge_score` does.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", ACL 2004, section 3, with the best precision and the best
recall over the references, which may come from two different ones.
"""

from collections.abc import Sequence

from evaluation.metrics.captions import Tokens, tokenize_captions
from evaluation.metrics.ptb import TOKENIZER
from evaluation.metrics.scores import Scores, mean

# How much more recall counts than precision.
BETA = 1.2


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """ROUGE-L, from 0 to 1; of a corpus the mean of its sentences.

    Args:
        predictions: one caption a sample.
        references: at least one caption a sample.

    Raises:
        ValueError: as `tokenize_captions`.
    """
    predicted, referred = tokenize_captions(predictions, references)
    sentences = [_score(tokens, captions) for tokens, captions in zip(predicted, referred, strict=True)]
    return Scores("rouge_l", mean(sentences), tuple(sentences), {"tokenizer": TOKENIZER})


def _score(prediction: Tokens, references: Sequence[Tokens]) -> float:
    # For coco-caption a caption without words is one empty word.
    prediction = prediction or ("",)
    references = [reference or ("",) for reference in references]
    common = [longest_common_subsequence(prediction, reference) for reference in references]
    precision = max(common) / len(prediction)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if precision == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common_subsequence(one: Tokens, other: Tokens) -> int:
    """The number of tokens in the longest sequence that both hold in this order, with gaps."""
    lengths = [0] * (len(other) + 1)
    for token in one:
        before = 0  # the length without this token and the one at `place`
        for place, candidate in enumerate(other, start=1):
            above = lengths[place]
            lengths[place] = before + 1 if token == candidate else max(above, lengths[place - 1])
            before = above
    return lengths[-1]
