"""`evaluate.load("evaluation/metrics/binary_accuracy")`."""

import evaluate

from evaluation.metrics.binary_accuracy import binary_accuracy
from evaluation.metrics.evaluate_info import TEXT, metric_info

CITATION = (
    "Lipping, Sudarsanam, Drossos and Virtanen: Clotho-AQA: A Crowdsourced Dataset for Audio Question Answering. "
    "EUSIPCO 2022."
)


class BinaryAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(binary_accuracy, CITATION, predictions=TEXT, references=TEXT)

    def _compute(self, predictions, references) -> dict:
        return binary_accuracy(predictions, references).as_dict()
