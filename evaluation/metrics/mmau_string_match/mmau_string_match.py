"""`evaluate.load("evaluation/metrics/mmau_string_match")`."""

import evaluate

from evaluation.metrics.evaluate_info import TEXT, TEXTS, metric_info
from evaluation.metrics.mmau_string_match import mmau_string_match

CITATION = "Sakshi et al.: MMAU: A Massive Multi-Task Audio Understanding and Reasoning Benchmark. ICLR 2025."


class MmauStringMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(mmau_string_match, CITATION, predictions=TEXT, references=TEXT, choices=TEXTS)

    def _compute(self, predictions, references, choices) -> dict:
        return mmau_string_match(predictions, references, choices).as_dict()
