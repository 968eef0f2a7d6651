"""`evaluate.load("evaluation/metrics/rouge_l")`."""

import evaluate

from evaluation.metrics.evaluate_info import captions_info
from evaluation.metrics.rouge_l import rouge_l

CITATION = "Lin: ROUGE: A Package for Automatic Evaluation of Summaries. ACL 2004 workshop Text Summarization."


class RougeL(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return captions_info(rouge_l, CITATION)

    def _compute(self, predictions, references) -> dict:
        return rouge_l(predictions, references).as_dict()
