"""`evaluate.load("evaluation/metrics/mean_average_precision")`."""

import datasets
import evaluate

from evaluation.metrics.evaluate_info import metric_info
from evaluation.metrics.mean_average_precision import mean_average_precision

CITATION = (
    "Fonseca, Favory, Pons, Font and Serra: FSD50K: An Open Dataset of Human-Labeled Sound Events. "
    "IEEE/ACM TASLP 30, 2022."
)


class MeanAveragePrecision(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            mean_average_precision,
            CITATION,
            predictions=datasets.Sequence(datasets.Value("float64")),
            references=datasets.Sequence(datasets.Value("int64")),
        )

    def _compute(self, predictions, references) -> dict:
        return mean_average_precision(predictions, references).as_dict()
