"""Recipes: what a training run is made of, from a YAML file and the command line.

A recipe is a flat YAML mapping. Its keys are the fields of the dataclasses below and of
`transformers.TrainingArguments`; each can be overridden on the command line (`--max_steps 50 --lora_r 4`), where
mappings are written as JSON (`--santa '{"weight": 0.5}'`).
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from transformers import GenerationConfig, HfArgumentParser, TrainingArguments

from processing_mats.processing_mats import DEFAULT_SANTA_SETTINGS

# Where things lie on one machine. The record of a run leaves them out: it is published with the checkpoint.
LOCATIONS = ("audio_dir", "cache_dir", "clap", "clap_reference", "data_dir", "eval_audio", "noise_pairs", "output_dir")
# What a run is told to do this time, but is no part of what it is.
ACTIONS = ("devices", "device_memory", "dry_run", "resume")


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text for `--help`."""
    return field(default=default, metadata={"help": help})


def parse_json(value: Any, name: str) -> Any:
    """A mapping as it is, or out of the JSON of the command line."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"--{name} is {value!r:.80}, which is no valid JSON: {error}") from error


def check_mapping(value: Any, name: str) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r:.80}, expected a mapping.")


def check_hard_prompts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`labels` and `count`, the latter 3 by default."""
    if unknown := sorted(map(str, set(settings) - {"labels", "count"})):
        raise ValueError(f"hard_prompts has the unknown settings {', '.join(unknown)}; known: labels, count.")
    labels, count = settings.get("labels"), settings.get("count", 3)
    if not isinstance(labels, str) or not labels:
        raise ValueError(f"hard_prompts has labels {labels!r:.80}, expected the path of a file.")
    if type(count) is not int or count < 1:
        raise ValueError(f"hard_prompts has count {count!r:.80}, expected a whole number from 1 up.")
    return {"labels": labels, "count": count}


@dataclass
class ModelArguments:
    """The language model, the adapters in it, the mapper in front of it, and the noise."""

    _argument_group_name = "model"

    language_model: str | None = option(None, "Hub repo or folder of a causal language model; without one a new one.")
    text_config: dict | str | None = option(
        None, "Configuration of a new language model; with language_model, the sizes that a dry run assumes offline."
    )
    new_vocab_size: int = option(4000, "Vocabulary of a new language model, learnt from the training texts.")
    train_language_model: bool = option(False, "Train every weight of the language model, not adapters in it.")
    language_model_dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Precision of the frozen language model's weights."
    )
    load_in_8bit: bool = option(False, "Quantise the language model to 8 bits (bitsandbytes).")
    load_in_4bit: bool = option(False, "Quantise the language model to 4 bits (bitsandbytes).")
    attn_implementation: str | None = option(None, "As in transformers: eager, sdpa, flash_attention_2, ...")
    lora_r: int = option(8, "Rank of the LoRA adapters; 0 leaves them out.")
    lora_alpha: float = option(32.0, "LoRA's alpha; the adapters are scaled by alpha / rank.")
    lora_dropout: float = option(0.1, "Dropout in front of the adapters.")
    lora_targets: list[str] | None = option(None, "Layers that get adapters; by default found by architecture.")
    audio_embed_dim: int | None = option(None, "Width of CLAP's embeddings; known from CLAP, so for dry runs only.")
    num_audio_tokens: int = option(40, "Positions that one audio takes in the prompt.")
    mapper_clap_tokens: int = option(40, "Tokens into which the mapper spreads the embedding.")
    mapper_hidden_size: int = option(768, "Width of the mapper.")
    mapper_num_layers: int = option(8, "Depth of the mapper.")
    mapper_num_heads: int = option(8, "Attention heads of the mapper.")
    mapper_intermediate_size: int = option(1536, "Width of the mapper's feed-forward layers.")
    mapper_dropout: float = option(0.0, "Dropout in the mapper.")
    noise_variance: str = option("0.015", "Variance of the training noise (Eq. 1), or `auto`: estimated from pairs.")
    noise_pairs: str | None = option(None, "Audiofolder with captions for noise_variance=auto.")
    noise_warmup: list[int] | None = option(None, "Two steps between which the noise rises to its variance.")
    renormalize: bool = option(True, "Normalise the embedding after the noise.")

    def __post_init__(self):
        self.text_config = parse_json(self.text_config, "text_config")
        check_mapping(self.text_config, "text_config")
        if self.language_model is None and self.text_config is None:
            raise ValueError("Name a language_model, or give a new one's text_config.")
        if self.language_model is None and not self.train_language_model:
            raise ValueError("A new language model knows nothing: it needs train_language_model.")
        if self.train_language_model and self.lora_r:
            raise ValueError(f"train_language_model trains every weight; set lora_r to 0, not {self.lora_r}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other.")
        if self.quantised and self.train_language_model:
            raise ValueError("A quantised language model cannot be trained whole; use LoRA.")
        if self.mapper_num_heads < 1 or self.mapper_hidden_size % self.mapper_num_heads:
            raise ValueError(
                f"mapper_hidden_size {self.mapper_hidden_size} is no multiple of mapper_num_heads "
                f"{self.mapper_num_heads}."
            )
        for name in ("num_audio_tokens", "mapper_clap_tokens", "mapper_num_layers", "mapper_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.noise_warmup is not None and (
            len(self.noise_warmup) != 2 or not 0 <= self.noise_warmup[0] < self.noise_warmup[1]
        ):
            raise ValueError(f"noise_warmup is {self.noise_warmup}, expected two rising numbers of steps.")
        if self.noise_variance != "auto":
            try:
                valid = float(self.noise_variance) >= 0
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"noise_variance is {self.noise_variance!r}, expected a number from 0 up or `auto`.")
        elif self.noise_pairs is None:
            raise ValueError("noise_variance=auto needs noise_pairs, an audiofolder with captions.")

    @property
    def quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    @property
    def mapper_config(self) -> dict[str, Any]:
        """The fields of [`MatsConfig`] that the recipe sets, but for the noise."""
        names = ("num_audio_tokens", "renormalize")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.startswith("mapper_")} | {
            name: getattr(self, name) for name in names
        }


@dataclass
class DataArguments:
    """Where the training texts come from, and in which order they are seen."""

    _argument_group_name = "data"

    mixture: dict | str | None = option(None, "Mixture of sources: a YAML file beside the recipe, or a mapping.")
    data_dir: str | None = option(None, "Folder under which the mixture's files lie.")
    clap: str | None = option(None, "Folder or Hub repo of a complete CLAP.")
    clap_subfolder: str = option("", "Folder of CLAP within it, such as `clap` in a MATS checkpoint.")
    clap_config: dict | str | None = option(None, "Configuration of CLAP that a dry run assumes where there is none.")
    cache_dir: str | None = option(None, "Folder of cached rows and embeddings; by default OUTPUT_DIR/cache.")
    embeddings_dtype: Literal["float32", "float16"] = option("float32", "Precision of cached embeddings.")
    supervision: Literal["text", "audio"] = option("text", "`audio` trains MATS-Audio: clips in place of descriptions.")
    audio_dir: str | None = option(None, "Folder of the clips that the mixture names, for supervision=audio.")
    data_order: Literal["shuffled", "sequential"] = option(
        "shuffled", "`sequential` sees the mixture once, in its own order, as staged mixtures need."
    )
    group_by_length: bool = option(True, "Put rows of like length into one batch, where data_order is shuffled.")
    unusable_rows: Literal["error", "drop"] = option(
        "error", "What to do with rows that are too long for the language model or hold its special tokens."
    )
    max_examples: int | None = option(None, "Take only the first so many rows of the mixture.")
    held_out: int = option(0, "Rows kept from training to evaluate on.")
    eval_audio: str | None = option(None, "Audiofolder with captions or labels, also to evaluate on.")
    truncate_texts: bool = option(True, "Cut texts that are too long for CLAP's text tower, not refuse them.")
    hard_prompts: dict | str | None = option(
        None, "PromptAAC's way: names of the nearest labels in each prompt, {labels: FILE, count: 3}."
    )

    def __post_init__(self):
        self.mixture = parse_json(self.mixture, "mixture")
        self.clap_config = parse_json(self.clap_config, "clap_config")
        check_mapping(self.clap_config, "clap_config")
        if self.mixture is None:
            raise ValueError("The recipe names no mixture of training texts.")
        if self.held_out < 0:
            raise ValueError(f"held_out is {self.held_out}, expected a number of rows.")
        self.hard_prompts = parse_json(self.hard_prompts, "hard_prompts")
        check_mapping(self.hard_prompts, "hard_prompts")
        if self.hard_prompts is not None:
            self.hard_prompts = check_hard_prompts(self.hard_prompts)


@dataclass
class MemoryArguments:
    """Santa's memory, drawn from the training texts."""

    _argument_group_name = "memory"

    memory_size: int = option(5172, "Texts in the memory (M); 0 saves none.")
    memory_clusters: int = option(100, "Clusters of k-means (K).")
    memory_shares: dict | str | None = option(None, "Shares of single sources; the rest is drawn from all.")
    memory_noise_variance: float | None = option(None, "Noise in the memory; by default the training noise.")
    memory_dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "Precision of the memory file.")
    santa: dict | str | None = option(None, "Santa's settings at inference; the paper's by default.")
    generation: dict | str | None = option(None, "Fields of the checkpoint's generation config.")

    def __post_init__(self):
        for name in ("memory_shares", "santa", "generation"):
            setattr(self, name, parse_json(getattr(self, name), name))
            check_mapping(getattr(self, name), name)
        if self.memory_size < 0 or (self.memory_size and not 1 <= self.memory_clusters <= self.memory_size):
            raise ValueError(f"A memory of {self.memory_size} texts cannot have {self.memory_clusters} clusters.")
        if unknown := sorted(set(self.santa or ()) - set(DEFAULT_SANTA_SETTINGS)):
            raise ValueError(
                f"santa has the unknown settings {', '.join(unknown)}; known: {', '.join(DEFAULT_SANTA_SETTINGS)}."
            )
        settings = GenerationConfig()
        if unknown := settings.update(**(self.generation or {})):
            raise ValueError(f"generation has the unknown fields {', '.join(unknown)}.")
        settings.validate(strict=True)
        if self.memory_shares and (min(self.memory_shares.values()) < 0 or sum(self.memory_shares.values()) > 1):
            raise ValueError(f"memory_shares are {self.memory_shares}, expected parts of 1.")


@dataclass
class RunArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what MATS adds. Rows come in a fixed order: sampling is sequential."""

    _argument_group_name = "run"

    global_batch_size: int | None = option(
        None, "Rows in one step over all devices; gradient_accumulation_steps follows from it."
    )
    checkpoint: Literal["whole", "light"] = option(
        "whole", "`light` leaves the language model's weights and CLAP to their own repos."
    )
    checkpoint_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Precision of the final checkpoint's weights."
    )
    clap_reference: str | None = option(
        None, "Where a light checkpoint says that its CLAP is; by default where it was for this run."
    )
    resume: bool = option(False, "Go on from the last whole checkpoint of OUTPUT_DIR, if there is one.")
    dry_run: bool = option(False, "Build the model without weights, print its size, the steps and the memory; stop.")
    devices: int = option(1, "Devices that a dry run plans for.")
    device_memory: str | None = option(None, "Memory of one device for a dry run, such as 24GB; measured by default.")
    ddp_find_unused_parameters: bool | None = option(
        False, "True for language models that leave parts out in a step, such as experts."
    )
    remove_unused_columns: bool = option(False, "Must be False: the collator needs every column.")
    train_sampling_strategy: str = option("sequential", "Must be sequential: see data_order and group_by_length.")
    per_device_train_batch_size: int = option(8, "Rows on one device at a time.")

    def __post_init__(self):
        if self.remove_unused_columns or self.train_sampling_strategy != "sequential":
            raise ValueError(
                "remove_unused_columns must be False and train_sampling_strategy `sequential`: the order of rows is "
                "the recipe's data_order and group_by_length."
            )
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "save_steps", "logging_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps is {self.max_steps}, expected at least 1, or -1 for num_train_epochs.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate is {self.learning_rate}, expected a number from 0 up.")
        if self.output_dir is None and self.dry_run:
            self.output_dir = "dry-run"  # which a dry run does not write
        if self.output_dir is None:
            raise ValueError("output_dir is missing: the folder in which the checkpoint is to be.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else bf16 would be refused, which a CPU can do as well
        super().__post_init__()
        if "epoch" in {self.save_strategy, self.eval_strategy, self.logging_strategy}:
            raise ValueError("save, eval and logging strategies are by steps: all passes over the rows are one here.")
        fsdp = self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if self.use_cpu and fsdp and not self.dry_run:
            raise ValueError("FSDP needs GPUs: on CPUs accelerate would run DDP without a word. Leave FSDP out.")
        if self.n_gpu > 1 and not self.dry_run:
            raise ValueError(
                f"This machine has {self.n_gpu} GPUs, and one process would split each batch over them. Start one for "
                f"each: torchrun --nproc_per_node {self.n_gpu} -m training.train_mats ..., or show one GPU alone: "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = self.accumulation_for(self.devices if self.dry_run else self.world_size)

    def accumulation_for(self, devices: int) -> int:
        """Micro-batches of one step on each of so many devices.

        Raises:
            ValueError: the global batch cannot be dealt out evenly.
        """
        at_once = self.per_device_train_batch_size * devices
        if self.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of per_device_train_batch_size "
                f"{self.per_device_train_batch_size} times {devices} devices."
            )
        return self.global_batch_size // at_once


@dataclass(frozen=True)
class Recipe:
    """A run, whole: what the four groups of arguments say.

    `name` is that of the file; `mixture_dir` is the folder from which relative paths inside the mixture start.
    """

    name: str
    mixture_dir: Path
    model: ModelArguments
    data: DataArguments
    memory: MemoryArguments
    run: RunArguments
    chosen: Mapping[str, Any]  # what file and command line set, without defaults

    def resolved(self) -> dict[str, Any]:
        """What was chosen, the mixture written out; without locations, actions and secrets. A language model in a local
        folder, and labels in an absolute path, are named by their own name."""
        kept = {
            key: value
            for key, value in self.chosen.items()
            if key not in (*LOCATIONS, *ACTIONS) and not key.endswith("_token")
        }
        for key in ("deepspeed", "language_model"):
            if isinstance(name := kept.get(key), str) and Path(name).exists():
                kept[key] = Path(name).name
        if (prompts := kept.get("hard_prompts")) is not None and Path(prompts["labels"]).is_absolute():
            kept["hard_prompts"] = {**prompts, "labels": Path(prompts["labels"]).name}
        return kept


class _Parser(HfArgumentParser):
    """Raises where argparse would exit, and takes names in full only."""

    def __init__(self):
        super().__init__(
            (ModelArguments, DataArguments, MemoryArguments, RunArguments), prog="mats train RECIPE", allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def load_recipe(path: Path, arguments: Sequence[str] = (), counts: Path | None = None) -> Recipe:
    """Reads a recipe file and the command line's overrides of it.

    Args:
        path (`Path`)
        arguments (`Sequence[str]`): of the command line.
        counts (`Path`, *optional*): `credits.csv` of the CLAP in use, for sources that draw labels by such a file. The
            record of the run does not name it: it lies somewhere on one machine.

    Raises:
        FileNotFoundError: no such recipe or mixture.
        ValueError: an unknown field, a value of the wrong type, or fields that contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such recipe: {path}")
    fields = read_yaml_mapping(path)
    parser = _Parser()
    known = {f.name for group in parser.dataclass_types for f in dataclasses.fields(group) if f.init}
    for name in fields:
        if name not in known:
            raise ValueError(f"{path} has an unknown field: {name}{_nearest(str(name), known)}")
    written = [part for name, value in fields.items() for part in _as_arguments(name, value)]
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            raise ValueError(f"There is no option {argument}{_nearest(name, known)}")
    model, data, memory, run = parser.parse_args_into_dataclasses([*written, *arguments], look_for_args_file=False)
    mixture_dir = path.parent
    if isinstance(data.mixture, str):
        mixture_file = path.parent / data.mixture
        if not mixture_file.is_file():
            raise FileNotFoundError(f"No such mixture: {mixture_file}")
        data.mixture, mixture_dir = read_yaml_mapping(mixture_file), mixture_file.parent
    if run.checkpoint == "light" and model.train_language_model:
        raise ValueError("A light checkpoint would leave the trained language model out; checkpoint must be `whole`.")
    groups = {f.name: group for group in (model, data, memory, run) for f in dataclasses.fields(group)}
    given = [a.removeprefix("--").partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")]
    names = dict.fromkeys([*fields, *(name if name in known else name.removeprefix("no_") for name in given)])
    chosen = {name: _plain(getattr(groups[name], name)) for name in names}
    if counts is not None:
        for source in data.mixture["sources"]:
            if "counts" in source:
                source["counts"] = str(counts.resolve())
    return Recipe(path.stem, mixture_dir, model, data, memory, run, chosen)


def help_text() -> str:
    """Every field of a recipe with its help."""
    return _Parser().format_help()


def read_yaml_mapping(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a mapping.")
    return content


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "."


def _as_arguments(name: str, value: Any) -> list[str]:
    """A field of the file as the command line would give it, so that both go through the same checks."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]


def _plain(value: Any) -> Any:
    """Without enums and settings objects, for YAML and JSON."""
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", None) or other.to_dict()))


__all__ = ["DataArguments", "MemoryArguments", "ModelArguments", "Recipe", "RunArguments", "help_text", "load_recipe"]
