"""`evaluate.load("evaluation/metrics/meteor")`."""

import evaluate

from evaluation.metrics.evaluate_info import captions_info
from evaluation.metrics.meteor import meteor

CITATION = (
    "Denkowski and Lavie: Meteor Universal: Language Specific Translation Evaluation for Any Target Language. WMT 2014."
)


class Meteor(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return captions_info(meteor, CITATION)

    def _compute(self, predictions, references, jars=None, memory="2G") -> dict:
        return meteor(predictions, references, jars, memory).as_dict()
