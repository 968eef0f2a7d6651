"""SPIDEr, the mean of CIDEr-D and SPICE.

Liu et al., "Improved Image Captioning via Policy Gradient Optimization of SPIDEr", ICCV 2017.
"""

import os
from collections.abc import Sequence

from evaluation.metrics.cider_d import cider_d
from evaluation.metrics.ptb import TOKENIZER
from evaluation.metrics.scores import Scores
from evaluation.metrics.spice import spice


def spider(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    jars: str | os.PathLike | None = None,
    memory: str = "8G",
    cache: str | os.PathLike | None = None,
) -> Scores:
    """SPIDEr, from 0 to 5.5, or `None` where SPICE is.

    Args and errors are those of `spice`.

    Returns:
        `details` hold the two scores, `cider_d` and `spice`, and where SPICE is missing the line that says how to get
        it, as `unavailable`.
    """
    semantic = spice(predictions, references, jars, memory, cache)
    consensus = cider_d(predictions, references)
    details = {"tokenizer": TOKENIZER, "cider_d": consensus.score, "spice": semantic.score}
    if semantic.score is None:
        return Scores("spider", None, (), {**details, "unavailable": semantic.details["unavailable"]})
    sentences = tuple((one + other) / 2 for one, other in zip(consensus.sentences, semantic.sentences, strict=True))
    return Scores("spider", (consensus.score + semantic.score) / 2, sentences, details)
