"""Recipes: the shipped ones hold the paper's numbers, and what is wrong in one is told."""

import pytest
import yaml
from conftest import ROOT

from training.audiotia.mixture import Mixture
from training.recipe import help_text, load_recipe

RECIPES = sorted(path for path in (ROOT / "training" / "recipes").glob("*.yaml") if path.stem != "mats_tiny_clap")
OUT = ["--output_dir", "out"]
SMALL = {"language_model": "gpt2", "mixture": {"sources": [{"reader": "audiocaps", "path": "a.csv"}]}, "max_steps": 10}


@pytest.fixture
def recipe_file(tmp_path):
    def write(**fields):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(SMALL | fields))
        return path

    return write


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_with_its_mixture(path):
    recipe = load_recipe(path, OUT)
    assert Mixture.load(recipe.data.mixture, recipe.mixture_dir).sources
    assert recipe.run.max_steps > 0


def test_five_recipes_are_there():
    assert {path.stem for path in RECIPES} == {"mats_audio", "mats_gpt2", "mats_llama", "mats_smol", "mats_tiny"}


@pytest.mark.parametrize(
    ("name", "rate", "schedule", "warmup", "batch", "steps"),
    [
        ("mats_gpt2", 5e-5, "linear", 2000, 128, 90_000),
        ("mats_llama", 3e-5, "cosine", 3000, 96, 360_000),
        ("mats_audio", 3e-5, "cosine", 3000, 96, 360_000),
    ],
)
def test_the_papers_recipes_hold_its_numbers(name, rate, schedule, warmup, batch, steps):
    """Section 4.1 of the paper."""
    recipe = load_recipe(ROOT / "training" / "recipes" / f"{name}.yaml", OUT)
    run, model, memory = recipe.run, recipe.model, recipe.memory
    assert (run.learning_rate, run.lr_scheduler_type, run.warmup_steps) == (rate, schedule, warmup)
    assert run.per_device_train_batch_size * run.gradient_accumulation_steps == batch
    assert run.max_steps == steps
    assert (model.lora_r, model.lora_alpha / model.lora_r, model.lora_dropout) == (8, 4, 0.1)
    assert (model.num_audio_tokens, model.mapper_num_layers, model.mapper_num_heads) == (40, 8, 8)
    if name == "mats_audio":
        assert recipe.data.supervision == "audio" and memory.memory_size == 0
    else:
        assert float(model.noise_variance) == 0.015
        assert (memory.memory_size, memory.memory_clusters) == (5172, 100)
        assert memory.santa == {"weight": 0.3, "temperature": 0.1, "top_k": 32}


def test_the_command_line_has_the_last_word(recipe_file):
    more = ["--max_steps", "50", "--lora-r", "4", "--no_renormalize", "--santa", '{"weight": 0.5}', "--bf16=false"]
    recipe = load_recipe(recipe_file(bf16=True, lora_targets=["c_attn"]), [*OUT, *more])
    assert (recipe.run.max_steps, recipe.model.lora_r, recipe.model.renormalize) == (50, 4, False)
    assert recipe.memory.santa == {"weight": 0.5}
    assert not recipe.run.bf16
    assert recipe.model.lora_targets == ["c_attn"]
    resolved = recipe.resolved()
    assert resolved["max_steps"] == 50 and resolved["renormalize"] is False and resolved["bf16"] is False
    assert "output_dir" not in resolved


def test_a_resolved_recipe_is_a_recipe(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(noise_warmup=[1, 5]), [*OUT, "--max_steps", "7", "--santa", '{"top_k": 3}'])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.resolved()))
    assert load_recipe(again, OUT).resolved() == recipe.resolved()


def test_hard_prompts_name_three_labels_by_default(recipe_file):
    more = ["--hard_prompts", '{"labels": "labels.txt"}']
    recipe = load_recipe(recipe_file(), [*OUT, *more])
    assert recipe.data.hard_prompts == recipe.resolved()["hard_prompts"] == {"labels": "labels.txt", "count": 3}
    assert load_recipe(recipe_file(), OUT).data.hard_prompts is None
    assert load_recipe(recipe_file(hard_prompts=None), OUT).data.hard_prompts is None


def test_the_global_batch_decides_the_accumulation(recipe_file):
    recipe = load_recipe(recipe_file(global_batch_size=96, per_device_train_batch_size=8), OUT)
    assert recipe.run.gradient_accumulation_steps == 12
    planned = load_recipe(
        recipe_file(global_batch_size=96, per_device_train_batch_size=8), [*OUT, "--dry_run", "--devices", "4"]
    )
    assert planned.run.gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    ("fields", "more", "says"),
    [
        ({"max_step": 3}, [], "unknown field: max_step; did you mean max_steps"),
        ({"lora": {"r": 8}}, [], "unknown field: lora"),
        ({}, ["--max_step", "3"], "no option --max_step; did you mean max_steps"),
        ({"max_steps": "many"}, [], "invalid int value: 'many'"),
        ({"mixture": "nowhere.yaml"}, [], "No such mixture"),
        ({"mixture": None}, [], "no mixture"),
        ({"language_model": None}, [], "Name a language_model"),
        ({"language_model": None, "text_config": {"model_type": "gpt2"}}, [], "needs train_language_model"),
        ({"train_language_model": True}, [], "set lora_r to 0"),
        ({"load_in_4bit": True, "load_in_8bit": True}, [], "exclude each other"),
        ({"load_in_4bit": True, "lora_r": 0, "train_language_model": True}, [], "cannot be trained whole"),
        ({"noise_variance": -1}, [], "noise_variance is '-1'"),
        ({"noise_variance": "some"}, [], "noise_variance is 'some'"),
        ({"noise_variance": "auto"}, [], "needs noise_pairs"),
        ({"noise_warmup": [5]}, [], "two rising numbers"),
        ({"noise_warmup": [5, 5]}, [], "two rising numbers"),
        ({"memory_size": 10}, [], "cannot have 100 clusters"),
        ({"memory_shares": {"a": 0.7, "b": 0.6}}, [], "parts of 1"),
        ({"held_out": -3}, [], "held_out is -3"),
        ({}, ["--santa", "{weight"], "no valid JSON"),
        ({"santa": 3}, [], "expected a mapping"),
        ({"hard_prompts": "labels.txt"}, [], "hard_prompts is 'labels.txt', expected a mapping"),
        ({"hard_prompts": {"labels": "a.txt", "counts": 2, "text": ""}}, [], "unknown settings counts, text; known:"),
        ({"hard_prompts": {"count": 2}}, [], "labels None, expected the path of a file"),
        ({"hard_prompts": {"labels": ["dog"]}}, [], "expected the path of a file"),
        ({"hard_prompts": {"labels": "a.txt", "count": 0}}, [], "count 0, expected a whole number from 1 up"),
        ({"hard_prompts": {"labels": "a.txt", "count": 2.5}}, [], r"count 2\.5, expected a whole number"),
        ({"hard_prompts": {"labels": "a.txt", "count": True}}, [], "count True, expected a whole number"),
        ({"global_batch_size": 100, "per_device_train_batch_size": 8}, [], "no multiple"),
        ({"remove_unused_columns": True}, [], "must be False"),
        ({"train_sampling_strategy": "random"}, [], "sequential"),
        ({"supervision": "smell"}, [], "invalid choice: 'smell'"),
        ({"santa": {"lambda": 0.3}}, [], "unknown settings lambda; known: weight"),
        ({"generation": {"max_new_token": 3}}, [], "unknown fields max_new_token"),
        ({"generation": {"temperature": 0.5}}, [], "temperature"),
        ({"per_device_train_batch_size": 0}, [], "expected more than 0"),
        ({"save_steps": 0}, [], "save_steps is 0"),
        ({"max_steps": -5}, [], "max_steps is -5"),
        ({"learning_rate": "nan"}, [], "learning_rate is nan"),
        ({"mapper_num_heads": 5}, [], "no multiple of mapper_num_heads 5"),
        ({"num_audio_tokens": 0}, [], "num_audio_tokens is 0"),
        ({"save_strategy": "epoch"}, [], "strategies are by steps"),
        ({"fsdp_config": {"fsdp_version": 2}}, ["--fsdp"], "FSDP needs GPUs"),
        ({"train_language_model": True, "lora_r": 0, "checkpoint": "light"}, [], "must be `whole`"),
    ],
)
def test_what_is_wrong_is_told(recipe_file, fields, more, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load_recipe(recipe_file(**fields), [*OUT, *more])


def test_a_dry_run_needs_no_output_folder(recipe_file):
    assert load_recipe(recipe_file(), ["--dry_run"]).run.dry_run


def test_what_is_saved_of_a_recipe_holds_no_secret_and_no_folder_of_the_machine(recipe_file, tmp_path):
    (tmp_path / "my-gpt2").mkdir()
    more = ["--hub_token", "hf_secret", "--language_model", str(tmp_path / "my-gpt2"), "--data_dir", str(tmp_path)]
    saved = load_recipe(recipe_file(accelerator_config={"split_batches": False}), [*OUT, *more]).resolved()
    text = yaml.safe_dump(saved)
    assert "hf_secret" not in text and str(tmp_path) not in text
    assert saved["language_model"] == "my-gpt2"
    assert saved["accelerator_config"]["split_batches"] is False


def test_files_that_are_no_recipes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    for content, says in [("- a list", "expected a mapping"), ("a: [", "no valid YAML")]:
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=says):
            load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="output_dir is missing"):
        load_recipe(RECIPES[0])


def test_every_field_has_a_help_text():
    text = help_text()
    for field in ("--language_model", "--mixture", "--memory_size", "--global_batch_size", "--learning_rate"):
        assert field in text
