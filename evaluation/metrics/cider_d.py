"""CIDEr-D, the consensus of captions by weighted n-grams.

Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, section 6: the variant that
coco-caption computes and that the literature calls CIDEr.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.metrics.captions import NGram, Tokens, count_ngrams, tokenize_captions
from evaluation.metrics.ptb import TOKENIZER
from evaluation.metrics.scores import Scores, mean

LONGEST = 4
# Standard deviation of the length penalty, in tokens.
SIGMA = 6.0
SCALE = 10.0


@dataclass(frozen=True)
class _Caption:
    """TF-IDF weights of one caption's n-grams, by their size - 1, and what the similarity needs beside them."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    bigrams: int


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """CIDEr-D, from 0 to 10.

    The weight of an n-gram falls with the number of samples whose references hold it, so a score depends on the whole
    corpus, and of a single sample it is always 0.

    Args:
        predictions: one caption a sample.
        references: at least one caption a sample.

    Raises:
        ValueError: as `tokenize_captions`.
    """
    predicted, referred = tokenize_captions(predictions, references)
    counted = [[count_ngrams(caption, LONGEST) for caption in row] for row in referred]
    samples_with: Counter[NGram] = Counter()
    for row in counted:
        samples_with.update(set().union(*row))

    total = len(predicted)
    sentences = []
    for tokens, row, captions in zip(predicted, counted, referred, strict=True):
        prediction = _weigh(tokens, count_ngrams(tokens, LONGEST), samples_with, total)
        others = (_weigh(*caption, samples_with, total) for caption in zip(captions, row, strict=True))
        sentences.append(SCALE * mean([_similarity(prediction, other) for other in others]))
    return Scores("cider_d", mean(sentences), tuple(sentences), {"tokenizer": TOKENIZER})


def _weigh(tokens: Tokens, counts: Mapping[NGram, int], samples_with: Mapping[NGram, int], total: int) -> _Caption:
    weights: list[dict[NGram, float]] = [{} for _ in range(LONGEST)]
    for ngram, count in counts.items():
        # An n-gram of no reference counts as one of a single sample.
        weights[len(ngram) - 1][ngram] = count * math.log(total / max(1, samples_with[ngram]))
    norms = [math.sqrt(sum(weight**2 for weight in size.values())) for size in weights]
    return _Caption(weights, norms, max(0, len(tokens) - 1))


def _similarity(prediction: _Caption, reference: _Caption) -> float:
    """The mean over the sizes of n-grams of a cosine that rewards no repetition, less a penalty for another length."""
    cosines = [
        sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs) / norm
        if (norm := norm_ours * norm_theirs)
        else 0.0
        for ours, theirs, norm_ours, norm_theirs in zip(
            prediction.weights, reference.weights, prediction.norms, reference.norms, strict=True
        )
    ]
    # coco-caption measures length in bigrams.
    return mean(cosines) * math.exp(-((prediction.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))
