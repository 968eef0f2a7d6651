"""The ablation: its plan, the corrections, and a whole run on a small scale."""

import csv
import json
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import make_clap
from filelock import FileLock, Timeout
from run_parts import NEW, write_parts, write_recipe
from typer.testing import CliRunner

from evaluation.ablation.corrections import fit_mean_gap, fit_whitening
from evaluation.ablation.figures import draw_figures
from evaluation.ablation.plan import Plan, Setting
from evaluation.ablation.report import REPORT_FILE, SUMMARY_FILE, summarise, to_markdown
from evaluation.ablation.run import RESULTS_FILE, ablate, read_lines
from mats_cli.main import app

SHIPPED = Path("evaluation/recipes/mats_tiny_long.yaml")
# How a plan changes what is trained, remembered and heard.
METHODS = {
    "full": {},
    "without memory": {"santa": False},
    "memory only": {"santa": {"use_audio": False}},
    "without training noise": {"train": {"noise_variance": 0.0}},
    "nearest labels": {"train": {"hard_prompts": {"count": 2}}, "santa": False, "seeds": [1]},
    "mean gap subtracted": {"santa": False, "correction": "mean_gap"},
    "whitening, then Santa": {"correction": "whitening"},
}
SWEEPS = [
    {"symbol": "λ", "place": "santa", "parameter": "weight", "values": [0.0, 1.0]},
    {"symbol": "M", "place": "memory", "parameter": "memory_size", "values": [5, 20]},
    {"symbol": "depth", "place": "train", "parameter": "mapper_num_layers", "values": [1, 2], "seeds": [0]},
]
CLIPS = {"fold": {"group": "fold4"}, "packages": {"packages": ["held-out"], "labels": "described", "captions": True}}


def write_sounds(folder: Path) -> Path:
    """The example sounds as clips of two groups and two packages."""
    examples = Path("examples/sounds")
    with (examples / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "caption", "group", "licence", "source"])
        for number, row in enumerate(rows):
            (folder / row["file_name"]).write_bytes((examples / row["file_name"]).read_bytes())
            group, package = [("fold4", "other"), ("", "held-out"), ("", "heard")][number % 3]
            caption = f"The sound of a {row['label']}."
            writer.writerow([row["file_name"], row["label"], caption, group, "CC0", f"{package} 1.0"])
    return folder


def write_plan(folder: Path, **fields) -> Path:
    recipe = write_recipe(folder, "recipe", **NEW)
    content = {
        "recipe": recipe.name,
        "descriptions": str(Path("training/mats_tiny/descriptions.yaml").resolve()),
        "overrides": {"max_steps": 3},
        "seeds": [0, 1],
        "clips": CLIPS,
        "methods": METHODS,
        "sweeps": SWEEPS,
        **fields,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_sounds(folder / "sounds")
    return folder


@pytest.fixture(scope="module")
def plan(parts):
    return write_plan(parts)


@pytest.fixture(scope="module")
def finished(parts, plan, tmp_path_factory):
    """A whole ablation: two seeds, five methods, three sweeps."""
    output = tmp_path_factory.mktemp("ablation")
    return ablate(plan, parts / "sounds", parts / "texts", output, str(parts / "clap"), jobs=2)


def test_the_shipped_plan_is_whole_and_shares_trainings():
    plan = Plan.load(SHIPPED)
    assert len(plan.seeds) >= 3
    names = [setting.run_name for setting, _ in plan.runs()]
    assert names.count("full") == len(plan.seeds)
    assert "noise_variance=0.006" not in names  # the recipe's own value
    assert names.count("noise_variance=0.0") == len(plan.seeds)  # shared by methods and sweep
    assert len(plan.settings()) == len({(setting.key, seed) for setting, seed in plan.settings()})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": [0, 0]}, "expected different ones"),
        ({"methods": {"a": {"santa": False}}}, "first method is the one"),
        (
            {"methods": {"full": {}, "b": {"correction": "ferry"}}},
            "no correction 'ferry', expected mean_gap",
        ),
        ({"methods": {"full": {}, "b": {"memory": {"size": 3}}}}, "memory has size, expected memory_size"),
        ({"methods": {"full": {}, "b": {"santa": {"lambda": 1}}}}, "santa has lambda"),
        ({"methods": {"full": {}, "b": {"traim": {}}}}, "The method 'b' has traim, expected train, memory, santa"),
        ({"clips": {"fold": {"label": "own"}}}, "The clip set 'fold' has label, expected name, group"),
        ({"sweeps": [{**SWEEPS[0], "letter": "x"}]}, "A sweep has letter, expected place, parameter"),
        ({"sweeps": [{**SWEEPS[0], "place": "moon"}]}, "in 'moon', expected train, memory, santa"),
        ({"sweeps": [{**SWEEPS[0], "values": []}]}, "has no values"),
        ({"sweeps": [{**SWEEPS[0], "seeds": [7]}]}, r"has the seeds \[7\], the plan \[0, 1\]"),
        ({"methods": {"full": {}, "b": {"seeds": [5]}}}, r"method 'b' has the seeds \[5\], the plan \[0, 1\]"),
        ({"clips": {"fold": {}}}, "needs either a group or packages"),
        ({"clips": {"fold": {"group": "a", "labels": "some"}}}, "expected own or described"),
        ({"methods": {"full": {}, "b": {"train": {"seed": 3}}}}, "train has seed, which the ablation itself sets"),
        ({"overrides": {"clap": "x"}}, "overrides has clap, which the ablation itself sets"),
        ({"clips": {"fold": {"packages": "lmms-common"}}}, "expected a list"),
        ({"sweeps": [{**SWEEPS[0], "values": ["high"]}]}, "has the value 'high', expected numbers"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_plan_with_a_mistake_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        Plan.load(write_plan(tmp_path, **fields))


def test_a_plan_may_add_methods_and_sweeps_to_another(tmp_path):
    base = Plan.load(write_plan(tmp_path))
    longer = tmp_path / "longer.yaml"
    longer.write_text(yaml.safe_dump({"extends": "plan.yaml", "methods": {"more": {"santa": False}}}))
    plan = Plan.load(longer)
    assert list(plan.methods) == [*METHODS, "more"]
    assert (plan.recipe, plan.sweeps, plan.clips) == (base.recipe, base.sweeps, base.clips)
    longer.write_text(yaml.safe_dump({"extends": "plan.yaml", "seeds": [7]}))
    with pytest.raises(ValueError, match=r"may add methods and sweeps, it has seeds"):
        Plan.load(longer)
    longer.write_text(yaml.safe_dump({"extends": "none.yaml"}))
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        Plan.load(longer)


def test_a_plan_whose_files_are_missing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such plan"):
        Plan.load(tmp_path / "plan.yaml")
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml, which is not there"):
        Plan.load(write_plan(tmp_path, recipe="nothing.yaml"))


def test_corrections_move_sound_to_where_texts_lie():
    generator = torch.Generator().manual_seed(0)
    meaning = torch.randn(400, 24, generator=generator)
    text = F.normalize(meaning + 0.5, dim=-1)
    audio = F.normalize(meaning * torch.linspace(0.2, 2, 24) - 1.0, dim=-1)  # stretched and shifted

    def gap(embeds):
        return (1 - (F.normalize(embeds, dim=-1) * text).sum(-1)).mean()

    moved, whitened = (fit(audio, text)(audio) for fit in (fit_mean_gap, fit_whitening))
    for embeds in (moved, whitened):
        assert torch.allclose(embeds.norm(dim=-1), torch.ones(400), atol=1e-5)
    assert gap(whitened) < gap(moved) < gap(audio)
    nothing = fit_mean_gap(text, text)(text)
    assert torch.allclose(nothing, text, atol=1e-6)


def test_every_setting_is_measured_once_for_each_seed(finished):
    lines = read_lines(finished.output / RESULTS_FILE)
    wanted = {(setting.key, seed) for setting, seed in finished.plan.settings()}
    assert {(line["setting"], line["seed"]) for line in lines} == wanted
    assert len(lines) == len(wanted)
    for line in lines:
        assert set(line["scores"]["fold"]) == {"matched", "named"}
        assert set(line["scores"]["packages"]) == {"matched", "cider_d", "cider_d_all"}
        assert len(line["answers"]["fold"]["Classify events in the audio clip."]) == 4


def test_models_differ_where_the_plan_says_so(finished):
    runs = {path.name for path in (finished.output / "runs").iterdir() if path.is_dir()}
    assert runs == {
        "full-seed0",
        "full-seed1",
        "noise_variance=0.0-seed0",
        "noise_variance=0.0-seed1",
        "mapper_num_layers=2-seed0",
        "hard_prompts=count2-seed1",
    }
    record = json.loads((finished.output / "runs" / "noise_variance=0.0-seed1" / "training_record.json").read_text())
    assert record["noise_variance"] == 0.0
    assert record["recipe"]["max_steps"] == 3


def test_a_finished_ablation_trains_and_asks_nothing_again(finished, parts, plan, monkeypatch):
    before = (finished.output / RESULTS_FILE).read_bytes()
    monkeypatch.setattr("evaluation.ablation.run.Ablation._evaluate", None)
    ablate(plan, parts / "sounds", parts / "texts", finished.output, str(parts / "clap"))
    assert (finished.output / RESULTS_FILE).read_bytes() == before


def test_a_line_that_a_stop_left_unfinished_is_measured_again(finished, parts, plan):
    path = finished.output / RESULTS_FILE
    whole = path.read_text()
    path.write_text(whole[:-20])
    ablate(plan, parts / "sounds", parts / "texts", finished.output, str(parts / "clap"))
    assert path.read_text() == whole


def test_scores_of_other_inputs_are_not_mixed_in(finished, parts, tmp_path):
    changed = write_plan(parts, overrides={"max_steps": 4})
    with pytest.raises(ValueError, match="begun with other inputs: recipe"):
        ablate(changed, parts / "sounds", parts / "texts", finished.output, str(parts / "clap"))
    write_plan(parts)


def test_the_report_has_means_spreads_and_differences(finished):
    summary = summarise(finished.plan, finished.output)
    lines = {(line["setting"], line["seed"]): line["scores"] for line in read_lines(finished.output / RESULTS_FILE)}
    own = [lines[Setting(santa=False).key, seed]["packages"]["cider_d"] for seed in (0, 1)]
    found = summary["methods"]["without memory"]["packages"]["cider_d"]
    assert found["values"] == own
    assert found["mean"] == pytest.approx(sum(own) / 2)
    assert summary["below_full"]["full"]["fold"]["matched"]["mean"] == 0
    assert [point["value"] for point in summary["sweeps"][1]["points"]] == [5, 20]
    assert summary["sweeps"][2]["points"][0]["scores"]["fold"]["matched"]["spread"] is None  # one seed
    report = (finished.output / REPORT_FILE).read_text()
    assert report == to_markdown(json.loads((finished.output / SUMMARY_FILE).read_text()))
    for name in METHODS:
        assert f"| {name} | " in report or f"| {name} (1 seed) | " in report
    assert summary["below_full"]["nearest labels"]["fold"]["matched"]["spread"] is None
    assert "CLAP alone on packages: clap_top1" in report


def test_figures_are_drawn(finished):
    pytest.importorskip("matplotlib")
    paths = draw_figures(summarise(finished.plan, finished.output), finished.output)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 300_000


def test_the_command_prints_the_report_of_what_is_there(finished, parts, plan):
    pytest.importorskip("matplotlib")
    options = {"--sounds": parts / "sounds", "--data-dir": parts / "texts", "--output": finished.output}
    arguments = [part for name, value in options.items() for part in (name, str(value))]
    result = CliRunner().invoke(app, ["ablate", str(plan), *arguments, "--clap", str(parts / "clap")])
    assert result.exit_code == 0, result.output
    assert "## Methods" in result.output
    assert (finished.output / "ablation_methods.png").is_file()


def test_a_second_ablation_in_the_same_folder_is_refused(finished, parts, plan):
    with FileLock(finished.output / ".lock"), pytest.raises(Timeout):
        ablate(plan, parts / "sounds", parts / "texts", finished.output, str(parts / "clap"))


def test_a_training_that_fails_is_named_with_its_log(parts, tmp_path):
    from evaluation.ablation.runs import TrainingFailed

    methods = {"full": {}, "odd": {"train": {"mapper_num_heads": 5}}}
    plan = write_plan(parts, methods=methods, sweeps=[], seeds=[0])
    with pytest.raises((TrainingFailed, ValueError), match=r"mapper_num_heads|mapper_hidden_size"):
        ablate(plan, parts / "sounds", parts / "texts", tmp_path, str(parts / "clap"))


@pytest.mark.slow
def test_trainings_end_with_a_killed_ablation(parts, tmp_path):
    """Else the next start would begin a second training in the same folder."""
    plan = write_plan(parts, overrides={"max_steps": 100_000}, methods={"full": {}}, sweeps=[], seeds=[0])
    options = {"--sounds": parts / "sounds", "--data-dir": parts / "texts", "--output": tmp_path / "out"}
    arguments = [str(part) for name, value in options.items() for part in (name, value)]
    command = [sys.executable, "-m", "mats_cli.main", "ablate", str(plan), *arguments, "--clap", str(parts / "clap")]
    ablation = psutil.Popen(command)
    checkpoints = tmp_path / "out" / "runs" / "full-seed0" / "checkpoints"
    deadline = time.monotonic() + 120
    while not any(checkpoints.glob("checkpoint-*")) and time.monotonic() < deadline:
        assert ablation.poll() is None
        time.sleep(0.2)
    children = ablation.children(recursive=True)
    assert children
    ablation.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    write_plan(parts)


def test_clips_that_clap_was_trained_on_are_refused(parts, tmp_path):
    clap = tmp_path / "clap"
    make_clap().save_pretrained(clap)
    name = next((parts / "sounds").glob("*.ogg")).name
    with (parts / "sounds" / "metadata.csv").open(newline="") as file:
        name = next(row["file_name"] for row in csv.DictReader(file) if row["group"] == "fold4")
    (clap / "credits.csv").write_text(f"file_name,label,licence,source\n{name},x,CC0,y\n")
    with pytest.raises(ValueError, match=rf"CLAP was trained on 1 of the clips, the first is {name}"):
        ablate(write_plan(parts), parts / "sounds", parts / "texts", tmp_path / "out", str(clap))
