"""BLEU as coco-caption computes it.

Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL 2002, with the reference nearest
in length, of equals the shorter, for the brevity penalty.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evaluation.metrics.captions import Tokens, count_ngrams, tokenize_captions
from evaluation.metrics.ptb import TOKENIZER
from evaluation.metrics.scores import Scores

LONGEST = 4
# coco-caption's guards against a division by 0: 0 matches of 0 n-grams are a precision of 1e-6.
TINY, SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class _Matches:
    """Counts of one sample or of a corpus; the tuples are by size of n-gram."""

    matched: tuple[int, ...]
    predicted: tuple[int, ...]
    length: int
    nearest_length: int


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], longest: int = LONGEST) -> Scores:
    """BLEU of n-grams of up to `longest` tokens, from 0 to 1, named `bleu_1` to `bleu_4`.

    The corpus is scored by its summed counts and not by the mean of its sentences. A sentence's score is as rough as
    coco-caption's: without smoothing, next to 0 where no n-gram of one size matches.

    Args:
        predictions: one caption a sample.
        references: at least one caption a sample.
        longest: 1 to 4.

    Raises:
        ValueError: as `tokenize_captions`, or another `longest`.
    """
    if longest not in range(1, LONGEST + 1):
        raise ValueError(f"longest is {longest}, expected 1 to {LONGEST}.")
    predicted, referred = tokenize_captions(predictions, references)
    samples = [_match(tokens, captions, longest) for tokens, captions in zip(predicted, referred, strict=True)]
    return Scores(f"bleu_{longest}", _score(_total(samples)), tuple(map(_score, samples)), {"tokenizer": TOKENIZER})


def _match(prediction: Tokens, references: Sequence[Tokens], longest: int) -> _Matches:
    most: Counter[Tokens] = Counter()
    for reference in references:
        most |= count_ngrams(reference, longest)
    matched = [0] * longest
    for ngram, count in (count_ngrams(prediction, longest) & most).items():
        matched[len(ngram) - 1] += count
    length = len(prediction)
    return _Matches(
        matched=tuple(matched),
        predicted=tuple(max(0, length - shorter) for shorter in range(longest)),
        length=length,
        nearest_length=min(
            (len(reference) for reference in references), key=lambda other: (abs(other - length), other)
        ),
    )


def _total(samples: Sequence[_Matches]) -> _Matches:
    def sums(rows: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(map(sum, zip(*rows, strict=True)))

    return _Matches(
        matched=sums(sample.matched for sample in samples),
        predicted=sums(sample.predicted for sample in samples),
        length=sum(sample.length for sample in samples),
        nearest_length=sum(sample.nearest_length for sample in samples),
    )


def _score(counts: _Matches) -> float:
    """The geometric mean of the precisions, less a penalty for brevity."""
    precisions = [
        (matched + TINY) / (predicted + SMALL)
        for matched, predicted in zip(counts.matched, counts.predicted, strict=True)
    ]
    ratio = (counts.length + TINY) / (counts.nearest_length + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return math.prod(precisions) ** (1 / len(precisions)) * brevity
