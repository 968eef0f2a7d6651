"""Text-only training by the stock Trainer: what it learns, what it leaves alone, what it writes."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SENTENCES, make_clap, make_model, make_processor, tone
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from configuration_mats import MatsConfig
from modeling_mats import MatsForConditionalGeneration
from processing_mats import MatsProcessor
from training import train_mats
from training.collator import MatsCollator
from training.text_embeddings import cached_text_embeddings, embed_examples
from training.text_examples import Example, Turn

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    example
    for text in SENTENCES
    for example in (
        Example(text, (Turn("Generate audio caption.", text),), "caption", "test"),
        Example(text, (Turn("What is it?", text.split()[1]), Turn("Sure?", "Yes.")), "conversation", "test"),
    )
]


def trainer_for(model, processor, dataset, folder, **arguments):
    settings = {
        "max_steps": 50,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 5,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 0,
        **arguments,
    }
    args = TrainingArguments(output_dir=str(folder), remove_unused_columns=False, report_to=[], **settings)
    return Trainer(model=model, args=args, train_dataset=dataset, data_collator=MatsCollator(processor))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A small GPT-2 that has learnt the first half of the examples, in place of a pretrained one."""
    folder = tmp_path_factory.mktemp("language-model")
    processor, model = make_processor(), make_model()
    dataset = embed_examples(EXAMPLES[::2], processor.clap, folder)
    trainer_for(model, processor, dataset, folder, learning_rate=1e-2).train()
    return model.language_model


# A prefix alone can do little with a frozen two-layer model; it must do something.
@pytest.mark.parametrize(("lora", "share"), [(False, 0.99), (True, 0.9)], ids=["mapper", "mapper and LoRA"])
def test_fifty_steps_lower_the_loss_and_change_no_base_weight(language_model, lora, share, tmp_path, monkeypatch):
    processor = make_processor()
    settings = {"mapper_hidden_size": 32, "mapper_num_heads": 4, "mapper_num_layers": 2, "noise_variance": 1e-4}
    model = MatsForConditionalGeneration.from_language_model(
        copy.deepcopy(language_model), 300, 301, audio_embed_dim=16, num_audio_tokens=4, **settings
    )
    dataset = embed_examples(EXAMPLES[1::2], processor.clap, tmp_path)
    model.freeze_language_model()
    if lora:
        pattern = r"language_model\..*\.c_attn"
        adapters = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": pattern, "fan_in_fan_out": True}
        model = get_peft_model(model, LoraConfig(**adapters, modules_to_save=["mapper"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clap_before = {name: tensor.clone() for name, tensor in processor.clap.model.state_dict().items()}

    def no_audio(*args, **kwargs):
        raise AssertionError("text-only training touched audio")

    for module in ("audio_mats", "processing_mats", "clap_mats"):
        for function in ("load_audio", "cut_windows"):
            monkeypatch.setattr(f"processing_mats.{module}.{function}", no_audio, raising=False)
    monkeypatch.setattr(type(processor.clap), "encode_audio", no_audio)
    monkeypatch.setattr(type(processor.clap.model), "get_audio_features", no_audio)
    monkeypatch.setattr(type(processor.santa_memory), "__call__", no_audio)

    trainer = trainer_for(model, processor, dataset, tmp_path, learning_rate=1e-2)
    loss_before = trainer.evaluate(dataset)["eval_loss"]
    trainer.train()  # 50 steps
    assert trainer.evaluate(dataset)["eval_loss"] < share * loss_before
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("mapper" in name for name in changed)
    assert all("mapper" in name or "lora_" in name for name in changed)
    assert any("lora_" in name for name in changed) == lora
    assert all(torch.equal(t, clap_before[n]) for n, t in processor.clap.model.state_dict().items())


def test_noise_rises_between_two_steps_and_is_whole_afterwards(tmp_path):
    processor, model = make_processor(), make_model(noise_variance=0.02)
    dataset = embed_examples(EXAMPLES, processor.clap, tmp_path)
    variances = []

    class Spy(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            variances.append(model.noise.variance)

    trainer = trainer_for(model, processor, dataset, tmp_path, max_steps=8)
    trainer.add_callback(train_mats.NoiseWarmup(first_step=2, last_step=6))
    trainer.add_callback(Spy())
    trainer.train()
    assert variances == pytest.approx([0, 0, 0, 0.005, 0.01, 0.015, 0.02, 0.02])
    assert model.noise.variance == 0.02


def test_an_unknown_key_of_a_recipe_is_refused(recipe_run, tmp_path):
    recipe = yaml.safe_load(Path(recipe_run[1][0]).read_text()) | {"lora": {"r": 8}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="unknown keys: lora"):
        train_mats.main([str(tmp_path / "recipe.yaml"), *recipe_run[1][1:], "--output_dir", str(tmp_path / "out")])


def test_training_is_reproducible(tmp_path):
    weights = []
    for run in range(2):
        processor, model = make_processor(), make_model()
        dataset = embed_examples(EXAMPLES, processor.clap, tmp_path / str(run))
        trainer_for(model, processor, dataset, tmp_path, max_steps=5).train()
        weights.append(model.mapper.out_proj.weight.detach().clone())
    assert torch.equal(*weights)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """The loss is a mean over all answer tokens of a step, however they are split (Trainer's num_items_in_batch)."""
    weights = []
    for batch, accumulation in [(8, 1), (2, 4)]:
        processor, model = make_processor(), make_model(noise_variance=0.0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        dataset = embed_examples(EXAMPLES, processor.clap, tmp_path)
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer_for(model, processor, dataset, tmp_path, max_steps=1, optim="sgd", max_grad_norm=0, **settings).train()
        weights.append(model.mapper.out_proj.weight.detach().clone())
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_the_collator_labels_the_answers_and_nothing_else():
    processor = make_processor()
    rows = [{"text_embeds": [0.25] * 16, "turns": [t._asdict() for t in example.turns]} for example in EXAMPLES]
    batch = MatsCollator(processor)(rows)
    for example, labels in zip(EXAMPLES, batch["labels"], strict=True):
        answers = "".join(f" {turn.answer}<|endoftext|>" for turn in example.turns)
        assert processor.decode(labels[labels != -100]) == answers
    torch.testing.assert_close(batch["audio_embeds"], torch.full((20, 1, 16), 0.25))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text_embeds": [0.25] * 16}, "lacks turns"),
        ({"turns": []}, "lacks text_embeds"),
        ({"text_embeds": [0.25] * 16, "turns": []}, "no turns"),
    ],
)
def test_the_collator_says_what_a_row_lacks(row, says):
    with pytest.raises(ValueError, match=says):
        MatsCollator(make_processor())([row])


def test_embeddings_are_computed_once(tmp_path, monkeypatch):
    clap = make_clap()
    first = embed_examples(EXAMPLES, clap, tmp_path)
    expected = clap.encode_text([example.description for example in EXAMPLES])
    torch.testing.assert_close(torch.tensor(first["text_embeds"]), expected)

    def no_more(*args, **kwargs):
        raise AssertionError("a cached text was embedded again")

    monkeypatch.setattr(type(clap), "encode_text", no_more)
    again = embed_examples(EXAMPLES, clap, tmp_path)
    assert again["text_embeds"] == first["text_embeds"]
    assert again["turns"] == [[turn._asdict() for turn in example.turns] for example in EXAMPLES]
    with pytest.raises(AssertionError, match="embedded again"):
        cached_text_embeddings(SENTENCES, make_clap(seed=1), tmp_path)


def test_nothing_to_embed_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no examples"):
        embed_examples([], make_clap(), tmp_path)


@pytest.fixture(scope="module")
def recipe_run(tmp_path_factory):
    """The recipe of mats-tiny, shrunk, run to its end from caption files."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "clap").mkdir()
    make_clap().save_pretrained(folder / "clap")
    texts = folder / "texts"
    for file in ("audiocaps/train.csv", "musiccaps/musiccaps-public.csv"):
        (texts / file).parent.mkdir(parents=True)
        (texts / file).write_text("caption\n" + "\n".join(SENTENCES) + "\n")
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / "mats_tiny.yaml").read_text())
    recipe["examples"]["held_out"] = 8
    recipe["examples"]["stages"][0]["count"] = 20
    recipe["examples"]["stages"][1]["count"] = 40
    recipe["tokenizer"]["vocab_size"] = 320
    recipe["new_language_model"].update(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    recipe["model"].update(mapper_hidden_size=32, mapper_intermediate_size=64)
    recipe["memory"].update(size=20, clusters=3)
    recipe["trainer"].update(max_steps=4, per_device_train_batch_size=4, logging_steps=1, save_steps=2, warmup_steps=1)
    recipe["trainer"].pop("bf16")
    path = folder / "recipe.yaml"
    for name in ("descriptions", "questions"):
        recipe["examples"][name] = str(ROOT / "training" / "mats_tiny" / f"{name}.yaml")
    path.write_text(yaml.safe_dump(recipe))
    arguments = [str(path), "--clap", str(folder / "clap"), "--texts", str(texts)]
    train_mats.main([*arguments, "--output_dir", str(folder / "out")])
    return folder, arguments


def test_a_recipe_ends_in_a_whole_checkpoint(recipe_run):
    out = recipe_run[0] / "out"
    model = MatsForConditionalGeneration.from_pretrained(out)
    processor = MatsProcessor.from_pretrained(out)
    assert len(processor.santa_memory) == 20
    assert processor.santa_settings["top_k"] == 16
    inputs = processor(text="What is making this sound?", audio=(tone(), 16000))
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    record = json.loads((out / "training_record.json").read_text())
    assert record["recipe"]["trainer"]["max_steps"] == 4
    assert sum(record["examples"].values()) == 60
    assert record["examples"]["source"] + record["examples"]["label"] >= 20
    assert record["clap_fingerprint"] == processor.clap.fingerprint


def test_a_resumed_run_ends_in_the_same_weights(recipe_run):
    folder, arguments = recipe_run
    halfway = folder / "halfway"
    recipe = yaml.safe_load(Path(arguments[0]).read_text())
    recipe["trainer"]["save_total_limit"] = None
    path = folder / "recipe_keeping.yaml"
    path.write_text(yaml.safe_dump(recipe))
    train_mats.main([str(path), *arguments[1:], "--output_dir", str(halfway)])
    for file in (halfway / "checkpoints" / "checkpoint-4").iterdir():
        file.unlink()
    (halfway / "checkpoints" / "checkpoint-4").rmdir()
    (halfway / "model.safetensors").unlink()
    train_mats.main([str(path), *arguments[1:], "--output_dir", str(halfway), "--resume"])
    whole, resumed = (MatsForConditionalGeneration.from_pretrained(folder / name) for name in ("out", "halfway"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_missing_caption_file_is_told_before_anything_runs(recipe_run, tmp_path):
    _, arguments = recipe_run
    with pytest.raises(FileNotFoundError, match=r"captions\.audiocaps"):
        train_mats.main([*arguments[:3], "--texts", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_a_recipe_can_name_a_pretrained_language_model(tmp_path):
    language_model = make_model("llama").language_model
    language_model.save_pretrained(tmp_path)
    make_processor().tokenizer.save_pretrained(tmp_path)
    recipe = {"language_model": str(tmp_path), "model": {"mapper_hidden_size": 32, "mapper_num_layers": 1}}
    tokenizer, model = train_mats.make_language_side(recipe, 16, [])
    assert isinstance(model.config, MatsConfig)
    assert model.config.audio_token_id == tokenizer.convert_tokens_to_ids("<|audio|>")
    kept = model.language_model.state_dict()
    for name, tensor in language_model.state_dict().items():
        torch.testing.assert_close(kept[name][: len(tensor)], tensor)
