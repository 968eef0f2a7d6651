"""`evaluate.load("evaluation/metrics/accuracy")`."""

import evaluate

from evaluation.metrics.accuracy import accuracy
from evaluation.metrics.evaluate_info import TEXT, metric_info


class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(accuracy, "", predictions=TEXT, references=TEXT)

    def _compute(self, predictions, references) -> dict:
        return accuracy(predictions, references).as_dict()
