"""What `evaluate` wants to know about a metric, from the docstrings of its function.

A metric's folder holds a script that `evaluate.load` copies and runs elsewhere, so the script imports this package by
its name. `evaluate` finds those imports by a regular expression, each on a line of its own.
"""

import inspect
from collections.abc import Callable

from datasets import Features, Sequence, Value
from evaluate import MetricInfo

from evaluation.metrics.scores import Scores

TEXT = Value("string")
TEXTS = Sequence(TEXT)


def metric_info(function: Callable[..., Scores], citation: str, **features: Value | Sequence) -> MetricInfo:
    """The description is the docstring of the function's module, the inputs' is the function's own.

    Args:
        function: predictions and references to scores.
        citation: the paper, or nothing.
        features: the type of one sample of each input that has one entry a sample.
    """
    return MetricInfo(
        description=inspect.getdoc(inspect.getmodule(function)),
        citation=citation,
        inputs_description=inspect.getdoc(function),
        features=Features(features),
    )


def captions_info(function: Callable[..., Scores], citation: str) -> MetricInfo:
    """Of a metric of captions against lists of captions."""
    return metric_info(function, citation, predictions=TEXT, references=TEXTS)
