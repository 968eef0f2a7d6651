"""Dry runs: plans, the lengths of rows, what is refused, and the report."""

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, SENTENCES
from run_parts import MAPPER, MIXTURE, write_parts, write_recipe
from test_dry_run_trace import AUDIO, SETUP, SIZES, arguments_for
from transformers import AutoTokenizer

from configuration_mats import MatsConfig
from modeling_mats import MatsForConditionalGeneration
from processing_mats import MatsProcessor
from training.collator import MatsCollator
from training.dry_run import (
    EVALUATION,
    TRAINING,
    MemoryPlan,
    find_text_config,
    parse_memory,
    plan,
    row_lengths,
    spread,
)
from training.language_side import make_processor
from training.recipe import ModelArguments, load_recipe

RECIPES = sorted(path for path in (ROOT / "training" / "recipes").glob("*.yaml") if "_clap" not in path.stem)


# -- Plans -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("dry_run"))


def recipe_of(folder: Path, *options: str, **fields):
    """A recipe that names no data and no CLAP."""
    (folder / "mixture.yaml").write_text(yaml.safe_dump(MIXTURE))
    path = folder / "tried.yaml"
    path.write_text(yaml.safe_dump({"mixture": "mixture.yaml", "max_steps": 10, **fields}))
    return load_recipe(path, ["--dry_run", "--output_dir", str(folder / "out"), *options])


PAPER = {
    "language_model": "gpt2",
    "text_config": {"model_type": "gpt2"},
    "max_steps": 90000,
    "global_batch_size": 128,
    "per_device_train_batch_size": 32,
    "bf16": True,
}
# As fast to plan as can be.
SMALL = {
    **PAPER,
    "text_config": {"model_type": "gpt2", "n_layer": 2},
    "mapper_num_layers": 1,
    "clap_config": {"text_config": {"model_type": "gpt2", "n_layer": 1}},
}
VICUNA = {
    "language_model": "nobody/vicuna-7b",
    "text_config": {"model_type": "llama"},
    "language_model_dtype": "bfloat16",
    "per_device_train_batch_size": 8,
    "bf16": True,
}


def test_mats_gpt2_has_the_papers_size(tmp_path):
    planned = plan(recipe_of(tmp_path, "--device_memory", "24GB", **PAPER))
    counts = {part.name: part.parameters for part in planned.parts}
    assert counts["language model"] == 124_439_808 + 768  # and the placeholder's row
    assert counts["CLAP's text tower"] == 124_439_808
    assert counts["LoRA adapters"] == 12 * 8 * (768 + 3 * 768)
    # "About 370 M" with CLAP; the paper leaves the mapper's widths open.
    assert sum(counts.values()) == pytest.approx(370e6, rel=0.06)
    assert planned.fits
    training = next(phase for phase in planned.phases if phase.name == TRAINING)
    needs = {need.name: need for need in training.needs}
    trained = counts["mapper"] + counts["LoRA adapters"]
    assert needs["gradients"].size == 4 * trained and needs["AdamW's two moments"].size == 8 * trained
    assert needs["language model, float32"].size == 4 * counts["language model"]
    assert training.size == sum(need.size for need in training.needs) > planned.other_checkpointing
    report = str(planned)
    assert "128 = 32 in a micro-batch x 4 accumulated x 1 device" in report
    assert "assumed, not measured: 40 of audio, 120 of text, 80 of them answer" in report
    assert "gpt2 is not on this machine" in report and "sizes of CLAP 2023" in report
    assert "It fits." in report


def test_llama_7b_on_a_small_card(tmp_path):
    planned = plan(recipe_of(tmp_path, "--device_memory", "12GB", **VICUNA))
    counts = {part.name: part.parameters for part in planned.parts}
    assert counts["language model"] == 6_738_415_616 + 2 * 4096
    assert counts["LoRA adapters"] == 32 * 2 * 8 * 2 * 4096
    assert not planned.fits
    report = str(planned)
    assert "Does not fit, by" in report
    assert "training. Its largest need is language model, bfloat16, 13.48 GB." in report
    changes = {remedy.change: remedy.size for remedy in planned.remedies}
    assert list(changes) == [
        "activation_checkpointing: true",
        "load_in_4bit: true, language_model_dtype: bfloat16",
        "per_device_train_batch_size: 1",
        "all of these at once",
        "--fsdp on 8 devices",
    ]
    # 4 bits alone leave the activations, and checkpointing the weights; together they do it.
    assert changes["all of these at once"] < planned.device.usable
    assert min(size for change, size in changes.items() if ":" in change) > planned.device.usable


def test_a_remedy_is_what_the_changed_recipe_takes(tmp_path):
    fields = {**SMALL, "bf16": False, "per_device_train_batch_size": 8, "global_batch_size": 8}
    options = ("--device_memory", "600MB")
    remedies = {remedy.change: remedy.size for remedy in plan(recipe_of(tmp_path, *options, **fields)).remedies}
    fields_tried = ["activation_checkpointing", "language_model_dtype", "per_device_train_batch_size"]
    tried = [change for change in remedies if change.partition(":")[0] in fields_tried]
    assert len(tried) == 3
    for change in tried:
        changed = plan(recipe_of(tmp_path, *options, **{**fields, **yaml.safe_load(change)}))
        assert changed.phases[1].size == remedies[change]


def test_fsdp_deals_out_what_is_stored(tmp_path):
    fields = SMALL
    one = {need.name: need.size for need in plan(recipe_of(tmp_path, **fields)).phases[1].needs}
    dealt = plan(recipe_of(tmp_path, "--devices", "4", "--fsdp", **fields))
    needs = {need.name: need for need in dealt.phases[1].needs}
    for name in ("language model, float32", "mapper and LoRA, float32", "gradients", "AdamW's two moments"):
        assert needs[name].size == one[name] // 4
    assert not needs["layers that FSDP puts together for a moment"].exact
    assert dealt.accumulation == 1 and "x 1 accumulated x 4 devices" in str(dealt)
    copies = plan(recipe_of(tmp_path, "--devices", "4", **fields)).phases[1]
    extra = {need.name: need.size for need in copies.needs}["gradients on their way between the devices"]
    assert extra == one["gradients"]


def test_evaluation_is_planned_where_there_is_something_to_evaluate(tmp_path):
    fields = {**SMALL, "per_device_eval_batch_size": 64}
    assert len(plan(recipe_of(tmp_path, **fields)).phases) == 2
    planned = plan(recipe_of(tmp_path, "--device_memory", "4GB", held_out=10, **fields))
    evaluation = planned.phases[2]
    assert evaluation.name == EVALUATION
    # All positions have logits, in bfloat16 and in float32.
    logits = 64 * 160 * 50258 * (2 + 4)
    assert evaluation.needs[-1].size > logits
    assert "per_device_eval_batch_size" in str(planned)


def test_an_optimizer_that_is_not_adamw_is_said_to_be_planned_as_one(tmp_path):
    fields = {**SMALL, "optim": "adafactor"}
    need = next(need for need in plan(recipe_of(tmp_path, **fields)).phases[1].needs if "moments" in need.name)
    assert "in place of adafactor" in need.name and not need.exact


def test_mats_audio_encodes_sounds(tmp_path):
    fields = {**SMALL, "supervision": "audio"}
    assert "8 windows in the audio tower" in str(plan(recipe_of(tmp_path, **fields)))


def test_a_clap_and_a_width_that_the_recipe_assumes(tmp_path):
    fields = {**SMALL, "clap": "no/where/at/all"}
    fields |= {"clap_config": {"projection_dim": 512, "text_config": {"model_type": "gpt2", "n_layer": 2}}}
    report = str(plan(recipe_of(tmp_path, **fields)))
    assert "CLAP: no/where/at/all is not on this machine; sizes from the recipe's clap_config." in report
    wide, narrow = (plan(recipe_of(tmp_path, **fields, audio_embed_dim=dim)).parts[3] for dim in (512, 256))
    assert wide.name == "mapper" and wide.parameters - narrow.parameters == 256 * 40 * 768


def test_the_report_of_the_measured_device(tmp_path):
    planned = plan(recipe_of(tmp_path, **SMALL))
    assert planned.device.memory > 10**9 and "Device: " in str(planned)


# -- Lengths -----------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_collators_rows(parts):
    options = ["--dry_run", "--data_dir", str(parts / "texts"), "--clap", str(parts / "clap")]
    options += ["--language_model", str(parts / "language-model"), "--output_dir", str(parts / "out")]
    recipe = load_recipe(write_recipe(parts, "adapted", lora_r=2), options)
    planned = plan(recipe)
    lengths = planned.lengths
    processor = MatsProcessor(AutoTokenizer.from_pretrained(parts / "language-model"), num_audio_tokens=AUDIO)
    collator = MatsCollator(processor)
    clotho = [f"Sound {number} is heard {n} times." for number in range(8) for n in range(1, 6)]
    totals, answers = [], []
    for captions in (SENTENCES, clotho):
        row = {"text_embeds": [1.0], "instruction": "Generate audio caption."}
        batches = [collator([{**row, "answer": caption}]) for caption in captions]
        totals.append([batch["input_ids"].shape[1] for batch in batches])
        answers.append([int((batch["labels"] != -100).sum()) for batch in batches])
    assert lengths.mean == pytest.approx(np.mean([np.mean(source) for source in totals]))
    # With so few rows the longest is what 99 of 100 do not exceed.
    assert lengths.longest == max(map(max, totals)) and lengths.answer == max(map(max, answers))
    assert AUDIO < lengths.mean < lengths.longest
    assert "measured on" in lengths.origin and "assumed" not in str(planned)
    assert "not on this machine" not in str(planned)
    made = MatsForConditionalGeneration.from_language_model(
        str(parts / "language-model"), processor.audio_token_id, len(processor.tokenizer), audio_embed_dim=16, **MAPPER
    )
    counts = {part.name: part.parameters for part in planned.parts}
    assert counts["language model"] == sum(p.numel() for p in made.language_model.parameters())


def test_steps_follow_from_the_rows(parts):
    options = ["--dry_run", "--data_dir", str(parts / "texts"), "--output_dir", str(parts / "out")]
    fields = {"text_config": SIZES["llama"], "new_vocab_size": 320, "train_language_model": True, "lora_r": 0}
    fields |= {"max_steps": -1, "num_train_epochs": 2, "held_out": 5}
    planned = plan(load_recipe(write_recipe(parts, "new", **fields), options))
    rows = planned.lengths.rows
    assert rows > 40 and planned.steps == -(-2 * rows // 4)
    # Without the files they are not known.
    planned = plan(load_recipe(write_recipe(parts, "new", **fields), [options[0], *options[3:]]))
    assert planned.steps is None and "depend on the number of rows" in str(planned)


def test_missing_files_of_the_mixture_are_told(parts, tmp_path):
    options = ["--dry_run", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(FileNotFoundError, match="audiocaps"):
        plan(load_recipe(write_recipe(parts, "absent", text_config=SIZES["llama"], language_model="x/y"), options))


def test_spread_takes_rows_from_all_over():
    assert spread(iter(range(7)), 4) == list(range(7))
    for total in (9, 100, 1000):
        kept = spread(iter(range(total)), 4)
        assert 4 <= len(kept) <= 8 and kept[0] == 0
        assert len({b - a for a, b in itertools.pairwise(kept)}) == 1
        assert kept[-1] >= total / 2


def test_row_lengths_in_batches(parts):
    from training.audiotia.examples import Example, Turn

    tokenizer = AutoTokenizer.from_pretrained(parts / "language-model")
    arguments = arguments_for("llama")
    examples = [
        Example("d", "What is it?", "A dog" + " barks" * number, "AQA", "sound", "s", None, (Turn("And?", "Yes."),))
        for number in range(5)
    ]
    collator = MatsCollator(make_processor(arguments, copy.deepcopy(tokenizer)))
    totals, answers = row_lengths(examples, collator, batch_size=2)
    alone = [row_lengths([example], collator) for example in examples]
    assert totals.tolist() == [int(total[0]) for total, _ in alone]
    assert answers.tolist() == [int(answer[0]) for _, answer in alone]
    assert len(set(totals)) == 5


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("0.5tb", 5 * 10**11), ("512MiB", 2**29)]
)
def test_sizes_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "24 giga", "-1GB", "0GB", ""])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match=r"expected a size such as 24GB or 24GiB"):
        parse_memory(text)


def test_a_language_model_of_unknown_size():
    with pytest.raises(ValueError, match=r"no/body is not on this machine.*give its sizes in text_config"):
        find_text_config(ModelArguments(language_model="no/body"))


def test_sizes_without_a_type_are_those_of_matsconfig():
    arguments = ModelArguments(language_model="no/body", text_config={"n_layer": 3})
    text_config, _ = find_text_config(arguments)
    assert type(text_config) is type(MatsConfig(text_config={"n_layer": 3}, audio_token_id=0).text_config)
    assert text_config.n_layer == 3


def test_adapters_on_layers_that_are_not_there(tmp_path):
    fields = {**SMALL, "lora_targets": ["q_proj"]}
    with pytest.raises(ValueError, match="no layers named q_proj"):
        plan(recipe_of(tmp_path, **fields))


# -- The recipes of this repository ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_planned_without_data(path, tmp_path):
    recipe = load_recipe(path, ["--dry_run", "--output_dir", str(tmp_path), "--device_memory", "24GB"])
    planned = plan(recipe)
    assert planned.fits
    report = str(planned)
    assert all(title in report for title in ("Parameters", "Steps", "Memory of a device", "Device: "))
    assert max(map(len, report.splitlines())) <= 140


def test_traces_are_shared_between_setups(tmp_path):
    recipe = recipe_of(tmp_path, **SMALL)
    text_config, _ = find_text_config(recipe.model)
    memory = MemoryPlan(recipe, text_config, 1024, plan(recipe).lengths)
    setup = dataclasses.replace(SETUP, on_cpu=False)
    assert memory.trace(setup) is memory.trace(dataclasses.replace(setup, bits=4, devices=8, sharded=True))
    assert memory.trace(setup) is not memory.trace(dataclasses.replace(setup, checkpointing=True))
