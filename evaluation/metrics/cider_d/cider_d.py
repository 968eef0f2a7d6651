"""`evaluate.load("evaluation/metrics/cider_d")`."""

import evaluate

from evaluation.metrics.cider_d import cider_d
from evaluation.metrics.evaluate_info import captions_info

CITATION = "Vedantam, Zitnick and Parikh: CIDEr: Consensus-based Image Description Evaluation. CVPR 2015."


class CiderD(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return captions_info(cider_d, CITATION)

    def _compute(self, predictions, references) -> dict:
        return cider_d(predictions, references).as_dict()
