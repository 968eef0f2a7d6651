"""`evaluate.load("evaluation/metrics/spider")`."""

import evaluate

from evaluation.metrics.evaluate_info import captions_info
from evaluation.metrics.spider import spider

CITATION = (
    "Liu, Zhu, Ye, Guadarrama and Murphy: Improved Image Captioning via Policy Gradient Optimization of SPIDEr. "
    "ICCV 2017."
)


class Spider(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return captions_info(spider, CITATION)

    def _compute(self, predictions, references, jars=None, memory="8G", cache=None) -> dict:
        return spider(predictions, references, jars, memory, cache).as_dict()
