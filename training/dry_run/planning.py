"""Puts a plan together from a recipe."""

import math
from dataclasses import replace

import torch
from transformers import AutoModel, PreTrainedConfig

from configuration_mats import MsClapConfig
from modeling_mats import MsClapModel
from training.dry_run.lengths import measure_lengths
from training.dry_run.model import count_clap, count_model
from training.dry_run.phases import MemoryPlan, caching_phase
from training.dry_run.remedies import find_remedies
from training.dry_run.report import Plan, RowLengths, Setup
from training.dry_run.sizes import find_clap_config, find_device, find_text_config
from training.recipe import ModelArguments, Recipe, RunArguments


def plan(recipe: Recipe) -> Plan:
    """What a run of a recipe would take.

    Raises:
        ValueError: the language model is not on this machine and the recipe gives no `text_config`; or what the recipe
            says of memory or adapters makes no sense.
    """
    run, origins = recipe.run, []
    clap_config, origin = find_clap_config(recipe.data)
    origins.append(origin)
    with torch.device("meta"):
        clap = MsClapModel(clap_config) if isinstance(clap_config, MsClapConfig) else AutoModel.from_config(clap_config)
    embed_dim = recipe.model.audio_embed_dim or clap_config.projection_dim

    lengths, vocabulary = measure_lengths(recipe)
    text_config, origin = find_text_config(recipe.model, vocabulary)
    origins.append(origin)
    device, on_cpu = find_device(run, "use_cpu" in recipe.chosen)
    setup = Setup(
        weights=_weights_dtype(recipe.model, text_config),
        bits=4 if recipe.model.load_in_4bit else 8 if recipe.model.load_in_8bit else None,
        compute=torch.bfloat16 if run.bf16 else torch.float16 if run.fp16 else None,
        checkpointing=_checkpointing(run),
        rows=run.per_device_train_batch_size,
        devices=run.devices,
        sharded=bool(run.fsdp),
        on_cpu=on_cpu,
    )
    if run.deepspeed:
        origins.append("DeepSpeed is not planned for: the figures are those without it.")

    memory = MemoryPlan(recipe, text_config, embed_dim, lengths)
    phases = [caching_phase(clap, by_audio=recipe.data.supervision == "audio"), memory.training(setup)]
    if recipe.data.held_out or recipe.data.eval_audio is not None:
        phases.append(memory.evaluation(setup))
    remedies = ()
    if phases[1].size > device.usable:
        remedies = find_remedies(recipe.model, setup, device.usable, lambda setup: memory.training(setup).size)
    return Plan(
        name=recipe.name,
        parts=(*count_clap(clap), *count_model(memory.model(setup))),
        steps=_steps(run, lengths),
        accumulation=run.gradient_accumulation_steps,
        setup=setup,
        lengths=lengths,
        device=device,
        phases=tuple(phases),
        other_checkpointing=memory.training(replace(setup, checkpointing=not setup.checkpointing)).size,
        remedies=remedies,
        origins=tuple(origins),
    )


def _weights_dtype(arguments: ModelArguments, text_config: PreTrainedConfig) -> torch.dtype:
    if arguments.language_model_dtype != "auto":
        return getattr(torch, arguments.language_model_dtype)
    return text_config.dtype or torch.float32


def _checkpointing(run: RunArguments) -> bool:
    own = run.fsdp_config if run.fsdp and isinstance(run.fsdp_config, dict) else {}
    return bool(run.activation_checkpointing or run.gradient_checkpointing or own.get("activation_checkpointing"))


def _steps(run: RunArguments, lengths: RowLengths) -> int | None:
    if run.max_steps > 0:
        return run.max_steps
    if lengths.rows is None:
        return None
    batch = run.per_device_train_batch_size * run.gradient_accumulation_steps * run.devices
    return math.ceil(run.num_train_epochs * lengths.rows / batch)
