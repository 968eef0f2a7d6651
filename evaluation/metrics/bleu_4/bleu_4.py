"""`evaluate.load("evaluation/metrics/bleu_4")`."""

import evaluate

from evaluation.metrics.bleu import bleu
from evaluation.metrics.evaluate_info import captions_info

CITATION = "Papineni, Roukos, Ward and Zhu: BLEU: a Method for Automatic Evaluation of Machine Translation. ACL 2002."


class Bleu4(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return captions_info(bleu, CITATION)

    def _compute(self, predictions, references) -> dict:
        return bleu(predictions, references, longest=4).as_dict()
