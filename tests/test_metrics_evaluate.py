"""Every metric as an `evaluate.Metric`, loaded by its folder, without a network and away from the repository."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from evaluation.metrics.accuracy import accuracy
from evaluation.metrics.binary_accuracy import binary_accuracy
from evaluation.metrics.bleu import bleu
from evaluation.metrics.cider_d import cider_d
from evaluation.metrics.mean_average_precision import mean_average_precision
from evaluation.metrics.meteor import meteor
from evaluation.metrics.mmau_string_match import mmau_string_match
from evaluation.metrics.rouge_l import rouge_l
from evaluation.metrics.spice import spice
from evaluation.metrics.spider import spider

METRICS = ROOT / "evaluation" / "metrics"
CAPTIONS = {
    "predictions": ["A dog barks in the rain", "rain falls", ""],
    "references": [["a dog is barking in the rain", "barking"], ["Rain falls on a roof."], ["wind"]],
}
INPUTS = {
    "accuracy": {"predictions": ["dog", "cat"], "references": ["dog", "dog"]},
    "binary_accuracy": {"predictions": ["Yes.", "Perhaps"], "references": ["yes", "no"]},
    "mean_average_precision": {"predictions": [[0.9, 0.4], [0.1, 0.6]], "references": [[1, 1], [0, 0]]},
    "mmau_string_match": {
        "predictions": ["a man", "a man or a woman"],
        "references": ["Man", "Man"],
        "choices": [["Man", "Woman"], ["Man", "Woman", "Child"]],
    },
    **dict.fromkeys(
        ["cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "spice", "spider"], CAPTIONS
    ),
}
EXPECTED = {
    "accuracy": accuracy,
    "binary_accuracy": binary_accuracy,
    "mean_average_precision": mean_average_precision,
    "mmau_string_match": mmau_string_match,
    "cider_d": cider_d,
    "bleu_1": lambda **inputs: bleu(**inputs, longest=1),
    "bleu_2": lambda **inputs: bleu(**inputs, longest=2),
    "bleu_3": lambda **inputs: bleu(**inputs, longest=3),
    "bleu_4": bleu,
    "rouge_l": rouge_l,
    "meteor": meteor,
    "spice": spice,
    "spider": spider,
}
# Takes the folder of metrics and their inputs; prints what each gives, by batches as well, and what it says of itself.
SCRIPT = """
import json, sys
import evaluate

folder, inputs = sys.argv[1], json.loads(sys.argv[2])
results = {}
for name, given in inputs.items():
    metric = evaluate.load(f"{folder}/{name}")
    at_once = metric.compute(**given)
    for row in zip(*given.values()):
        metric.add_batch(**{key: [value] for key, value in zip(given, row)})
    results[name] = [at_once, metric.compute(), metric.description, metric.inputs_description]
try:
    evaluate.load(f"{folder}/meteor").compute(**inputs["cider_d"], jars="nowhere")
except NotADirectoryError as error:
    results["jars"] = str(error)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("evaluate", reason="the package evaluate comes with the extra `evaluation`")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(elsewhere / "home")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(METRICS), json.dumps(INPUTS)],
        cwd=elsewhere,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_folder_is_tried():
    folders = {path.parent.name for path in METRICS.glob("*/*.py")}
    assert folders == INPUTS.keys() == EXPECTED.keys()
    assert all((METRICS / name / f"{name}.py").is_file() for name in folders)


@pytest.mark.parametrize("name", INPUTS)
def test_a_loaded_metric_gives_what_its_function_gives(name, results):
    at_once, by_batches, description, inputs_description = results[name]
    expected = json.loads(json.dumps(EXPECTED[name](**INPUTS[name]).as_dict()))
    assert name in expected
    assert at_once == by_batches == expected
    assert description and inputs_description


def test_options_reach_the_function(results):
    assert re.match(r"nowhere is no folder, expected one with meteor-1\.5\.jar", results["jars"])


def test_the_functions_import_neither_evaluate_nor_datasets():
    names = sorted({"bleu", *INPUTS} - {f"bleu_{longest}" for longest in range(1, 5)})
    code = f"import sys, {', '.join(f'evaluation.metrics.{name}' for name in names)}\nprint([*sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'evaluation.metrics.scores'" in run.stdout
    assert not re.search("'(evaluate|datasets|torch)'", run.stdout)
