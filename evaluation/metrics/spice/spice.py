"""`evaluate.load("evaluation/metrics/spice")`."""

import evaluate

from evaluation.metrics.evaluate_info import captions_info
from evaluation.metrics.spice import spice

CITATION = "Anderson, Fernando, Johnson and Gould: SPICE: Semantic Propositional Image Caption Evaluation. ECCV 2016."


class Spice(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return captions_info(spice, CITATION)

    def _compute(self, predictions, references, jars=None, memory="8G", cache=None) -> dict:
        return spice(predictions, references, jars, memory, cache).as_dict()
