"""Text-only training by the stock Trainer: what it learns, and what it leaves alone."""

import copy

import pytest
import torch
from conftest import SENTENCES, make_model, make_processor
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_mats import MatsForConditionalGeneration
from training.audiotia.examples import Example, Turn
from training.callbacks import NoiseWarmup
from training.collator import MatsCollator

EXAMPLES = [
    example
    for text in SENTENCES
    for example in (
        Example(text, "Generate audio caption.", text, "caption", "sound", "test"),
        Example(text, "What?", text.split()[1], "conversation", "sound", "test", None, (Turn("Sure?", "Yes."),)),
    )
]


def embedded(examples, clap) -> Dataset:
    """A data set as a user would make it: rows with a `text_embeds` column."""
    return Dataset.from_list(
        [
            {
                "text_embeds": embed.tolist(),
                "instruction": example.instruction,
                "answer": example.answer,
                "further_turns": [turn._asdict() for turn in example.further_turns],
            }
            for example, embed in zip(examples, clap.encode_text([e.description for e in examples]), strict=True)
        ]
    )


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
    dataset = embedded(EXAMPLES[::2], processor.clap)
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
    dataset = embedded(EXAMPLES[1::2], processor.clap)
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
    dataset = embedded(EXAMPLES, processor.clap)
    variances = []

    class Spy(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            variances.append(model.noise.variance)

    trainer = trainer_for(model, processor, dataset, tmp_path, max_steps=8)
    trainer.add_callback(NoiseWarmup(first_step=2, last_step=6))
    trainer.add_callback(Spy())
    trainer.train()
    assert variances == pytest.approx([0, 0, 0, 0.005, 0.01, 0.015, 0.02, 0.02])
    assert model.noise.variance == 0.02


def test_training_is_reproducible(tmp_path):
    weights = []
    for _ in range(2):
        processor, model = make_processor(), make_model()
        dataset = embedded(EXAMPLES, processor.clap)
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
        dataset = embedded(EXAMPLES, processor.clap)
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer_for(model, processor, dataset, tmp_path, max_steps=1, optim="sgd", max_grad_norm=0, **settings).train()
        weights.append(model.mapper.out_proj.weight.detach().clone())
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)
