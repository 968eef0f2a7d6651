"""Trains MATS on text alone, by the stock `Trainer`.

    mats train training/recipes/mats_tiny.yaml --data_dir TEXTS --output_dir OUT
    torchrun --nproc_per_node 2 -m training.train_mats RECIPE --data_dir TEXTS --output_dir OUT

TEXTS is the folder with the files that the recipe's mixture names. OUT becomes a checkpoint: model, processor, memory
and the run's own records. Every field of the recipe can be overridden, `--resume` goes on from the last checkpoint of a
broken-off run, and `--dry_run` only says what the run would take.
"""

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, set_seed

from modeling_mats import MatsForConditionalGeneration
from processing_mats import ClapEncoder, MatsProcessor
from training.audiotia.mixture import DataCard, Mixture, build_mixture
from training.bundled import resolve_clap
from training.callbacks import NoiseWarmup
from training.collator import MatsCollator
from training.embed import audio_cache, embed_examples, text_cache
from training.embedding_cache import EmbeddingCache, Ranks, write_atomically
from training.eval_audio import audio_rows
from training.language_side import load_language_model, make_model, make_processor, make_tokenizer
from training.long_rows import find_long_rows
from training.memory import make_memory
from training.noise import estimate_from_folder
from training.recipe import Recipe, help_text, load_recipe
from training.rows import SequentialOrder, TrainingOrder, TrainingRows, lengths_of, split_rows
from training.run_folder import CHECKPOINTS, RECORD_FILE, last_checkpoint, open_run, written_whole

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "mats")


@dataclass
class RunData:
    """The rows of a run with their embeddings, and which are trained on."""

    examples: Dataset
    card: DataCard
    cache: EmbeddingCache
    cache_rows: np.ndarray
    train: np.ndarray
    held_out: np.ndarray
    too_long: int = 0

    def texts(self):
        """Instructions and answers of the training rows, as a new language model's tokenizer learns from them."""
        for row in self.examples.select(self.train):
            for turn in (row, *row["further_turns"]):
                yield turn["instruction"]
                yield " " + turn["answer"]


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        print(help_text())
        return
    recipe = load_recipe(Path(arguments[0]), arguments[1:])
    if recipe.run.dry_run:
        from training.dry_run import plan

        print(plan(recipe))
        return
    train(recipe)


def train(recipe: Recipe) -> Path:
    """Runs a recipe; see the module's docstring. Returns the folder of the checkpoint.

    Raises:
        FileNotFoundError, ValueError: files that the recipe names are missing or of another form, told before anything
            heavy runs.
    """
    started = time.monotonic()
    run, output_dir = recipe.run, Path(recipe.run.output_dir)
    ranks = Ranks(run.process_index, run.world_size)
    for name in ("clap", "data_dir"):
        if getattr(recipe.data, name) is None:
            raise ValueError(f"{name} is missing: give --{name}.")
    mixture = Mixture.load(recipe.data.mixture, recipe.mixture_dir)
    mixture.check(Path(recipe.data.data_dir))
    if ranks.index == 0:
        open_run(output_dir, recipe.resolved(), run.resume)
    ranks.wait()
    cache_dir = Path(recipe.data.cache_dir or output_dir / "cache")

    set_seed(run.seed)
    clap = load_clap(recipe)
    data = prepare_data(recipe, mixture, clap, cache_dir, ranks)
    noise_variance = resolve_noise(recipe, clap, ranks)
    with run.main_process_first(desc="tokenizer"):
        tokenizer = make_tokenizer(recipe.model, data.texts(), cache_dir / "tokenizer")
    processor = make_processor(recipe.model, tokenizer, santa_settings=recipe.memory.santa)
    set_seed(run.seed)  # the model starts the same, whatever was to be done before
    model = make_model(recipe.model, processor, clap.embed_dim, noise_variance)
    processor.max_positions = getattr(model.config.text_config, "max_position_embeddings", None)
    long = find_long_rows(data.examples, processor, refuse=recipe.data.long_rows == "error")
    data.train, data.held_out = np.setdiff1d(data.train, long), np.setdiff1d(data.held_out, long)
    data.too_long = len(long)
    memory = None
    if recipe.memory.memory_size and recipe.data.supervision == "text":
        settings = (clap.fingerprint, noise_variance, recipe.model.renormalize, run.seed)
        memory = make_memory(recipe.memory, data.examples, data.train, data.cache, data.cache_rows, *settings)
    processor.clap, processor.santa_memory = clap, memory

    trainer = make_trainer(recipe, model, processor, data)
    clap.model.to("cpu")  # everything is encoded
    checkpoint = None
    if run.resume:
        with run.main_process_first(desc="checkpoint"):  # which removes what a stop left half-written
            checkpoint = last_checkpoint(output_dir)
        tell(ranks, f"Going on from {checkpoint or 'the beginning: there is no checkpoint yet'}.")
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = trainer.evaluate() if trainer.eval_dataset else {}
    trainer.save_model(str(output_dir / CHECKPOINTS / "last"))  # gathers what FSDP has dealt out
    if ranks.index == 0:
        record = make_record(recipe, data, clap, model, trainer, result.metrics, metrics, started)
        finish(recipe, output_dir, processor, record)
    ranks.wait()
    return output_dir


def tell(ranks: Ranks, message: str) -> None:
    """Says once, however many ranks there are, what a run is about to do."""
    if ranks.index == 0:
        print(message, file=sys.stderr, flush=True)


def load_clap(recipe: Recipe) -> ClapEncoder:
    name, subfolder = resolve_clap(recipe.data.clap), recipe.data.clap_subfolder
    try:
        return ClapEncoder.from_pretrained(name, subfolder=subfolder, device=recipe.run.device)
    except OSError as error:
        where = f"{name}, {subfolder}/" if subfolder else name
        raise OSError(f"The CLAP {where} could not be loaded: {error}") from error


def prepare_data(recipe: Recipe, mixture: Mixture, clap: ClapEncoder, cache_dir: Path, ranks: Ranks) -> RunData:
    """Reads the mixture, embeds what is to be seen of it, and splits off what is held out."""
    arguments, run = recipe.data, recipe.run
    with run.main_process_first(desc="mixture"):
        built = build_mixture(mixture, Path(arguments.data_dir), cache_dir)
    examples = built.dataset
    if arguments.max_examples is not None:
        examples = examples.select(range(min(arguments.max_examples, len(examples))))
    if ranks.index == 0:
        card = json.dumps(built.card.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(run.output_dir) / "data_card.json", card.encode())
        write_atomically(Path(run.output_dir) / "data_card.md", built.card.to_markdown().encode())
    by_audio = arguments.supervision == "audio"
    if by_audio and arguments.audio_dir is None:
        raise ValueError("supervision=audio needs audio_dir, the folder of the clips that the mixture names.")
    cache = (audio_cache if by_audio else text_cache)(cache_dir, clap, arguments.embeddings_dtype)
    audio_dir = Path(arguments.audio_dir) if by_audio else None
    rows = embed_examples(examples, clap, cache, audio_dir, ranks, arguments.truncate_texts)
    tell(ranks, f"{len(examples)} rows, {len(np.unique(rows))} different embeddings, {cache.encoded} newly encoded.")
    train_rows, held_out = split_rows(examples, arguments.held_out, arguments.data_order == "sequential", run.seed)
    return RunData(examples, built.card, cache, rows, train_rows, held_out)


def resolve_noise(recipe: Recipe, clap: ClapEncoder, ranks: Ranks) -> float:
    """The variance of the training noise: the recipe's number, or estimated from pairs of sound and text."""
    if recipe.data.supervision == "audio":
        return 0.0  # MATS-Audio trains on what it will hear
    if recipe.model.noise_variance != "auto":
        return float(recipe.model.noise_variance)
    estimate = estimate_from_folder(Path(recipe.model.noise_pairs), clap, seed=recipe.run.seed)
    tell(ranks, f"Noise variance, estimated from {estimate.pairs} pairs: {estimate.variance:.4f}.")
    return estimate.variance


def make_trainer(
    recipe: Recipe, model: MatsForConditionalGeneration, processor: MatsProcessor, data: RunData
) -> Trainer:
    """The stock `Trainer` over the rows in their order, with held-out texts and real sounds to evaluate on."""
    run = recipe.run
    batch = run.per_device_train_batch_size * run.gradient_accumulation_steps * run.world_size
    steps_in_epoch = len(data.train) / batch
    steps = run.max_steps if run.max_steps > 0 else int(np.ceil(run.num_train_epochs * steps_in_epoch))
    if recipe.data.data_order == "sequential":
        if steps * batch > len(data.train):
            raise ValueError(
                f"data_order=sequential sees each row once: {len(data.train)} rows are no {steps} steps of {batch}."
            )
        order = SequentialOrder(len(data.train))
    else:
        lengths = lengths_of(data.examples)[data.train] if recipe.data.group_by_length else None
        order = TrainingOrder(len(data.train), batch, run.seed, lengths)
    run.max_steps = steps
    run.output_dir = str(Path(run.output_dir) / CHECKPOINTS)
    evaluation = {}
    if len(data.held_out):
        evaluation["text"] = TrainingRows(data.examples, data.cache, data.cache_rows, data.held_out)
    if recipe.data.eval_audio is not None:
        evaluation["audio"] = audio_rows(Path(recipe.data.eval_audio), processor, data.cache.folder.parent)
    if run.eval_strategy != "no" and not evaluation:
        raise ValueError("eval_strategy is set, but there is nothing to evaluate on: set held_out or eval_audio.")
    return Trainer(
        model=model,
        args=run,
        train_dataset=TrainingRows(
            data.examples, data.cache, data.cache_rows, data.train, order, steps * batch, run.seed
        ),
        eval_dataset=evaluation or None,
        data_collator=MatsCollator(processor),
        callbacks=[NoiseWarmup(*recipe.model.noise_warmup)] if recipe.model.noise_warmup else None,
    )


def finish(recipe: Recipe, output_dir: Path, processor: MatsProcessor, record: dict[str, Any]) -> None:
    """Writes the checkpoint of a finished run, whole or light, from the weights that the Trainer saved last."""
    light = recipe.run.checkpoint == "light"
    last = output_dir / CHECKPOINTS / "last"
    elsewhere = {} if recipe.model.language_model is None else {"language_model": load_language_model(recipe.model)}
    model = MatsForConditionalGeneration.from_pretrained(last, **(elsewhere if is_light(last) else {}))
    if not light and model.config.lora is not None:
        model.merge_lora()
    model.generation_config.update(**(recipe.memory.generation or {}))
    if light:
        processor.clap_name_or_path = recipe.run.clap_reference or resolve_clap(recipe.data.clap)
        processor.clap_subfolder = recipe.data.clap_subfolder
    with written_whole(output_dir) as folder:
        model.to(getattr(torch, recipe.run.checkpoint_dtype)).save_pretrained(folder, light=light)
        processor.save_pretrained(folder, light=light)
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def is_light(checkpoint: Path) -> bool:
    return bool(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("light"))


def make_record(
    recipe: Recipe,
    data: RunData,
    clap: ClapEncoder,
    model: MatsForConditionalGeneration,
    trainer: Trainer,
    train_metrics: dict,
    eval_metrics: dict,
    started: float,
) -> dict[str, Any]:
    """What the checkpoint's card needs to tell of the run. It names no folder of the machine."""
    return {
        "recipe": recipe.resolved(),
        "command": f"mats train {recipe.name}.yaml --data_dir TEXTS --output_dir OUT",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "devices": {"count": recipe.run.world_size, "type": recipe.run.device.type, "threads": torch.get_num_threads()},
        "clap_fingerprint": clap.fingerprint,
        "noise_variance": model.config.noise_variance,
        "data": data.card.to_dict(),
        "rows": {
            "train": len(data.train),
            "held_out": len(data.held_out),
            "too_long": data.too_long,
            "seen": len(trainer.train_dataset),
        },
        "parameters": count_parameters(model, clap),
        "seconds": round(time.monotonic() - started),  # of the last sitting
        "resumed": recipe.run.resume,
        "train": train_metrics,
        "evaluation": eval_metrics,
        "log": trainer.state.log_history,
    }


def count_parameters(model: MatsForConditionalGeneration, clap: ClapEncoder) -> dict[str, int]:
    named = list(model.named_parameters())
    return {
        "mapper": sum(p.numel() for name, p in named if name.startswith("mapper.")),
        "language_model": sum(p.numel() for name, p in named if ".lora_" not in name and "language_model." in name),
        "lora": sum(p.numel() for name, p in named if ".lora_" in name),
        "clap": sum(p.numel() for p in clap.model.parameters()),
        "trained": sum(p.numel() for _, p in named if p.requires_grad),
    }


if __name__ == "__main__":
    main()
