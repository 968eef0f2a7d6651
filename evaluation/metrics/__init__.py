"""Metrics of the paper's tasks: each a pure function of predictions and references that returns `Scores`.

    from evaluation.metrics.cider_d import cider_d
    cider_d(["a dog barks"], [["a dog is barking", "barking dog"]]).score

| module | functions | predictions, references |
| --- | --- | --- |
| `accuracy` | `accuracy` | labels, labels |
| `binary_accuracy` | `binary_accuracy` | answers, "yes" or "no" |
| `mean_average_precision` | `mean_average_precision` | a score per class, 0 or 1 per class |
| `mmau_string_match` | `mmau_string_match` | answers, right options; also the options |
| `cider_d`, `bleu`, `rouge_l` | `cider_d`, `bleu`, `rouge_l` | captions, lists of captions |
| `meteor`, `spice`, `spider` | `meteor`, `spice`, `spider` | captions, lists of captions; also a folder of jars |

Each is an `evaluate.Metric` as well, which `evaluate.load("evaluation/metrics/cider_d")` finds by folder. Such a folder
has no `__init__.py` on purpose: where a module and a folder share a name, Python imports the module.
"""
