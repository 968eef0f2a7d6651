"""What a run would take, found out without weights, data or a GPU: parameters, steps, tokens and memory.

    mats train RECIPE --dry_run --devices 4 --device_memory 80GB

The model is built at its full size on tensors without content, so that LLaMA-7B takes seconds and little memory. Of the
figures, parameters and what goes with them (weights, gradients, the optimizer's state) are exact. The rest is found by
running the forward and the backward pass of one micro-batch on such tensors (PyTorch's `FakeTensorMode`) and counting
which are alive at a time; see [`trace_step`].
"""

import copy
import itertools
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from configuration_mats import MatsConfig, MsClapConfig
from modeling_mats import MatsForConditionalGeneration, MsClapModel
from modeling_mats.lora_mats import is_lora_name, resolve_lora
from training.audiotia.examples import Example
from training.audiotia.mixture import Mixture
from training.bundled import resolve_clap
from training.collator import MatsCollator
from training.language_side import make_processor, train_tokenizer
from training.recipe import DataArguments, ModelArguments, Recipe, RunArguments

GB = 10**9
# Rows that are read and rows of them whose tokens are counted, over all sources.
SCANNED_ROWS, COUNTED_ROWS = 128_000, 4_000
# What a row is taken to hold beside the audio positions where none can be looked at: many times a caption, and more
# than most of the long open-ended answers.
ASSUMED_TEXT_TOKENS = 120
ASSUMED_ANSWER_TOKENS = 80
# Part of a device's memory that nothing is planned into: the CUDA context, the kernels' workspaces, fragmentation.
FREE_PART = 0.1
# As embed_texts and embed_clips take them.
TEXTS_AT_A_TIME, WINDOWS_AT_A_TIME = 64, 8
# bitsandbytes: NF4 has a float32 scale for every 64 values, LLM.int8 one for every output.
NF4_BLOCK = 64
# Names under which the architectures keep the dropout within the attention.
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# Optimizers whose state is two moments in the parameters' own precision.
FULL_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused")
MOST_DEVICES = 8
CACHING, TRAINING, EVALUATION = "CLAP's embeddings, once before it", "Training", "Evaluation"


# -- The plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the model, and how many of them are trained."""

    name: str
    parameters: int
    trained: int = 0


@dataclass(frozen=True)
class Need:
    """What one thing takes of a device's memory, in bytes; `exact`, or found by tracing."""

    name: str
    size: int
    exact: bool = True


@dataclass(frozen=True)
class Phase:
    """Part of a run, with all that lies in a device's memory at once."""

    name: str
    needs: tuple[Need, ...]

    @property
    def size(self) -> int:
        return sum(need.size for need in self.needs)


@dataclass(frozen=True)
class RowLengths:
    """Positions of a training row, audio positions and template included.

    Attributes:
        mean (`float`): over the sources, and over the rows of each.
        longest (`int`): that 99 of 100 rows of every source do not exceed; memory is planned for it.
        answer (`int`): labelled positions, that 99 of 100 rows of every source do not exceed.
        origin (`str`): where the figures come from.
        rows (`int`, *optional*): rows to train on, where the steps depend on them.
    """

    mean: float
    longest: int
    answer: int
    origin: str
    rows: int | None = None


@dataclass(frozen=True)
class Setup:
    """What decides over the memory of training and can be chosen.

    Attributes:
        weights (`torch.dtype`): precision of a pretrained language model's weights.
        bits (`int`, *optional*): 4 or 8, where it is quantised.
        compute (`torch.dtype`, *optional*): precision of autocast, where it is on.
        checkpointing (`bool`): whether activations are computed again in the backward pass.
        rows (`int`): of a micro-batch.
        devices (`int`): on which copies are trained, or with `sharded` (FSDP) parts.
        on_cpu (`bool`): whether they are CPUs, whose fused attention knows no dropout.
    """

    weights: torch.dtype
    bits: int | None
    compute: torch.dtype | None
    checkpointing: bool
    rows: int
    devices: int
    sharded: bool
    on_cpu: bool


@dataclass(frozen=True)
class Remedy:
    """A change to the recipe, and the bytes of a device that training would take with it."""

    change: str
    size: int


@dataclass(frozen=True)
class Device:
    """One device's memory in bytes."""

    name: str
    memory: int

    @property
    def usable(self) -> int:
        return round(self.memory * (1 - FREE_PART))


@dataclass(frozen=True)
class Plan:
    """What a run would take. `str()` is the report.

    Attributes:
        name (`str`): the recipe's.
        parts: parameters, CLAP's first.
        steps (`int`, *optional*): of the optimizer; `None` where they depend on data that is not here.
        accumulation (`int`): micro-batches in a step.
        setup, lengths, device: what the memory is planned for.
        phases: CLAP's embedding, training, and where there is something to evaluate on, evaluation.
        other_checkpointing (`int`): bytes of training with activation checkpointing switched over.
        remedies: what would help, where training does not fit.
        origins: where sizes come from that are not the recipe's own.
    """

    name: str
    parts: tuple[Part, ...]
    steps: int | None
    accumulation: int
    setup: Setup
    lengths: RowLengths
    device: Device
    phases: tuple[Phase, ...]
    other_checkpointing: int
    remedies: tuple[Remedy, ...]
    origins: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(phase.size <= self.device.usable for phase in self.phases)

    def __str__(self) -> str:
        sections = [
            [f"Dry run of {self.name}: nothing is downloaded or trained.", *self.origins],
            self._parameter_lines(),
            self._step_lines(),
            self._memory_lines(),
            self._fit_lines(),
        ]
        return "\n\n".join("\n".join(section) for section in sections)

    def _parameter_lines(self) -> list[str]:
        clap = [part for part in self.parts if part.name.startswith("CLAP")]
        rest = [part for part in self.parts if part not in clap]
        totals = [
            Part(name, sum(p.parameters for p in parts), sum(p.trained for p in parts))
            for name, parts in (("without CLAP", rest), ("with CLAP", self.parts))
        ]
        rows = [(part.name, _millions(part.parameters), _millions(part.trained)) for part in (*self.parts, *totals)]
        return [f"{'Parameters':34}{'all':>12}{'trained':>12}"] + [
            f"  {name:32}{parameters:>12}{trained:>12}" for name, parameters, trained in rows
        ]

    def _step_lines(self) -> list[str]:
        setup, lengths = self.setup, self.lengths
        batch = setup.rows * self.accumulation * setup.devices
        split = f"{setup.rows} in a micro-batch x {self.accumulation} accumulated x {_devices(setup.devices)}"
        length = f"{lengths.mean:.0f} positions"
        if lengths.mean != lengths.longest:
            length += f" on average, at most {lengths.longest} in 99 of 100 rows"
        lines = ["Steps", f"  rows in a step      {batch:,} = {split}", f"  length of a row     {length}"]
        lines += [f"                      {part}" for part in lengths.origin.split("; ")]
        if self.steps is None:
            return [*lines, "  steps               depend on the number of rows; set max_steps, or give --data_dir"]
        rows = self.steps * batch
        lines.insert(1, f"  steps               {self.steps:,}")
        return [*lines, f"  in all              {rows:,} rows, {rows * lengths.mean / 1e6:,.0f} M positions"]

    def _memory_lines(self) -> list[str]:
        lines = [f"{'Memory of a device':58}{'GB':>8}"]
        for phase in self.phases:
            lines.append(f"  {phase.name}")
            lines += [
                f"    {need.name:54}{_gigabytes(need.size):>8}  {'exact' if need.exact else 'traced'}"
                for need in phase.needs
            ]
            lines.append(f"    {'in all':54}{_gigabytes(phase.size):>8}")
            if phase.name == TRAINING:
                switched = f"in all {'without' if self.setup.checkpointing else 'with'} activation checkpointing"
                lines.append(f"    {switched:54}{_gigabytes(self.other_checkpointing):>8}")
        return lines

    def _fit_lines(self) -> list[str]:
        device = self.device
        free = f"{_gigabytes(device.memory - device.usable)} GB of it left free for context, workspaces, fragmentation"
        lines = [f"Device: {device.name}, {_gigabytes(device.memory)} GB, {free}."]
        for phase in self.phases:
            if (over := phase.size - device.usable) <= 0:
                continue
            largest = max(phase.needs, key=lambda need: need.size)
            lines.append(
                f"Does not fit, by {_gigabytes(over)} GB: {phase.name.lower()}. Its largest need is {largest.name}, "
                f"{_gigabytes(largest.size)} GB."
            )
            if phase.name == EVALUATION:
                lines.append("    A smaller per_device_eval_batch_size takes less.")
            if phase.name == TRAINING:
                lines += [
                    f"    {f'with {remedy.change}':54}{_gigabytes(remedy.size):>8}  "
                    + ("fits" if remedy.size <= device.usable else "does not fit yet")
                    for remedy in self.remedies
                ]
        return [*lines, "It fits."] if self.fits else lines


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


# -- What the recipe names, as far as it is on this machine ------------------------------------------------------------


def find_clap_config(arguments: DataArguments) -> tuple[PreTrainedConfig, str]:
    """CLAP's configuration, and where it is from: CLAP itself, the recipe's assumption, or CLAP 2023."""
    if arguments.clap is not None:
        where = {"subfolder": arguments.clap_subfolder, "local_files_only": True}
        try:
            return AutoConfig.from_pretrained(resolve_clap(arguments.clap), **where), f"CLAP: {arguments.clap}."
        except OSError:
            absent = f"{arguments.clap} is not on this machine"
    else:
        absent = "the recipe names none"
    if arguments.clap_config is not None:
        config = AutoConfig.for_model(**{"model_type": MsClapConfig.model_type, **arguments.clap_config})
        return config, f"CLAP: {absent}; sizes from the recipe's clap_config."
    return MsClapConfig(), f"CLAP: {absent}; sizes of CLAP 2023."


def find_text_config(arguments: ModelArguments, vocabulary: int | None = None) -> tuple[PreTrainedConfig, str]:
    """The language model's configuration with a row for `<|audio|>`, and where it is from.

    Args:
        vocabulary (`int`, *optional*): tokens of the tokenizer with `<|audio|>`, where it is known.

    Raises:
        ValueError: the language model is not on this machine, and there is no `text_config`.
    """
    name = arguments.language_model
    if name is None:
        config = _text_config(arguments)
        config.vocab_size = vocabulary or arguments.new_vocab_size + 1
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 0  # the defaults may lie beyond the end
        return config, "Language model: a new one."
    try:
        config, origin = AutoConfig.from_pretrained(name, local_files_only=True), f"Language model: {name}."
    except OSError as error:
        if arguments.text_config is None:
            raise ValueError(
                f"{name} is not on this machine. For a dry run without it, give its sizes in text_config, such as "
                "{model_type: llama}."
            ) from error
        config = _text_config(arguments)
        origin = f"Language model: {name} is not on this machine; sizes from the recipe's text_config."
    config.vocab_size = max(config.vocab_size, vocabulary or config.vocab_size + 1)
    return config, origin


def _text_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The recipe's own sizes, of the type that [`MatsConfig`] would take them for."""
    return AutoConfig.for_model(**{"model_type": MatsConfig().text_config.model_type, **arguments.text_config})


def find_device(run: RunArguments, cpu_chosen: bool) -> tuple[Device, bool]:
    """The memory to plan for, and whether it is a CPU's: `device_memory`, of a GPU unless the recipe chose `use_cpu`,
    or this machine's own.

    Args:
        cpu_chosen (`bool`): whether `use_cpu` is the recipe's; a dry run also sets it itself.
    """
    on_cpu = cpu_chosen and run.use_cpu
    if run.device_memory is not None:
        return Device("as given by device_memory", parse_memory(run.device_memory)), on_cpu
    if not on_cpu and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory), False
    return Device("the memory of this machine", psutil.virtual_memory().total), True


def parse_memory(text: str) -> int:
    """Bytes of `24GB` (of 1000³ bytes) or `24GiB` (of 1024³).

    Raises:
        ValueError: written otherwise, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"device_memory is {text!r}, expected a size such as 24GB or 24GiB.")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1))


def measure_lengths(recipe: Recipe) -> tuple[RowLengths, int | None]:
    """Lengths of the mixture's rows and the size of the vocabulary; assumed, and `None`, where they are not here."""
    audio = recipe.model.num_audio_tokens
    assumed = partial(RowLengths, audio + ASSUMED_TEXT_TOKENS, audio + ASSUMED_TEXT_TOKENS, ASSUMED_ANSWER_TOKENS)
    assumption = (
        f"assumed, not measured: {audio} of audio, {ASSUMED_TEXT_TOKENS} of text, {ASSUMED_ANSWER_TOKENS} of them "
        "answer; "
    )
    if recipe.data.data_dir is None:
        return assumed(f"{assumption}no data_dir is given"), None
    mixture = Mixture.load(recipe.data.mixture, recipe.mixture_dir)
    folder = Path(recipe.data.data_dir)
    mixture.check(folder)
    rows = None
    if recipe.run.max_steps <= 0:
        rows = sum(1 for _ in itertools.islice(mixture.examples(folder), recipe.data.max_examples))
        rows = max(rows - recipe.data.held_out, 0)
    # Each by itself: they follow one another, and their lengths differ.
    alone = [replace(mixture, sources=(source,)) for source in mixture.sources]
    scanned, counted = (math.ceil(number / len(alone)) for number in (SCANNED_ROWS, COUNTED_ROWS))
    sources = [spread(itertools.islice(source.examples(folder), scanned), counted) for source in alone]
    sources = [examples for examples in sources if examples]
    if not sources:
        raise ValueError("The mixture has not a single row.")
    name = recipe.model.language_model
    if name is None:
        turns = (turn for examples in sources for example in examples for turn in example.turns)
        texts = (text for turn in turns for text in (turn.instruction, " " + turn.answer))
        tokenizer = train_tokenizer(texts, recipe.model.new_vocab_size)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except OSError:
            return assumed(f"{assumption}the tokenizer of {name} is not on this machine", rows), None
    processor = make_processor(recipe.model, tokenizer)
    counts = [row_lengths(examples, MatsCollator(processor)) for examples in sources]
    lengths = RowLengths(
        mean=float(np.mean([totals.mean() for totals, _ in counts])),
        longest=max(math.ceil(np.percentile(totals, 99)) for totals, _ in counts),
        answer=max(math.ceil(np.percentile(answers, 99)) for _, answers in counts),
        origin=f"measured on {sum(map(len, sources)):,} rows, spread over the first {scanned:,} of each source",
        rows=rows,
    )
    return lengths, len(processor.tokenizer) if name is not None else None


def spread(examples: Iterable[Example], count: int) -> list[Example]:
    """Some of the examples, in even distances from the first on: all, where there are at most `2 * count`, and else
    between `count` and twice as many."""
    kept, distance = [], 1
    for number, example in enumerate(examples):
        if number % distance == 0:
            kept.append(example)
        if len(kept) > 2 * count:
            kept, distance = kept[::2], 2 * distance
    return kept


def row_lengths(
    examples: Sequence[Example], collator: MatsCollator, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and labelled positions of each example, `(examples,)` both, as the collator makes them."""
    totals, answers = [], []
    for start in range(0, len(examples), batch_size):
        rows = [
            {
                "text_embeds": torch.ones(1),  # of any width: it takes the same positions
                "instruction": example.instruction,
                "answer": example.answer,
                "further_turns": [turn._asdict() for turn in example.further_turns],
            }
            for example in examples[start : start + batch_size]
        ]
        batch = collator(rows)
        totals.append(batch["attention_mask"].sum(1).numpy())
        answers.append((batch["labels"] != -100).sum(1).numpy())
    return np.concatenate(totals), np.concatenate(answers)


# -- The model, without weights ----------------------------------------------------------------------------------------


def build_model(
    arguments: ModelArguments, text_config: PreTrainedConfig, embed_dim: int, setup: Setup
) -> MatsForConditionalGeneration:
    """MATS as it starts into training, on the meta device: adapters put in, precisions and `requires_grad` as then."""
    text_config = copy.deepcopy(text_config)
    if not setup.on_cpu:
        # The trace runs the CPU's kernels, whose fused attention falls back to an unfused one where there is dropout.
        # Those of GPUs have dropout built in.
        for name in ATTENTION_DROPOUTS:
            if hasattr(text_config, name):
                setattr(text_config, name, 0.0)
    # Of the implementations only eager keeps other tensors; the fused ones that need a GPU are traced as sdpa.
    eager = {"attn_implementation": "eager"} if arguments.attn_implementation == "eager" else {}
    config = MatsConfig(
        text_config=text_config,
        audio_token_id=text_config.vocab_size - 1,
        audio_embed_dim=embed_dim,
        **arguments.mapper_config,
        **eager,
    )
    with torch.device("meta"):
        model = MatsForConditionalGeneration(config)
        if not arguments.train_language_model:
            model.freeze_language_model()
            if arguments.lora_r:
                _add_lora(arguments, model.language_model)
        stored = setup.weights if arguments.language_model is not None else torch.float32
        for name, parameter in model.language_model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if is_lora_name(name) else stored)
    return model


def _add_lora(arguments: ModelArguments, language_model: PreTrainedModel) -> None:
    # As add_lora does it, which has no use for a model without weights and refuses one.
    from peft import LoraConfig

    settings = {"r": arguments.lora_r, "lora_alpha": arguments.lora_alpha, "lora_dropout": arguments.lora_dropout}
    settings = resolve_lora(language_model, arguments.lora_targets or "auto", settings)
    transposed = any(isinstance(module, Conv1D) for module in language_model.modules())
    language_model.add_adapter(LoraConfig(**settings, fan_in_fan_out=transposed))


def fill_with_fakes(model: nn.Module) -> None:
    """Within a `FakeTensorMode`: tensors of the meta device become ones that pretend to be on the CPU, where the trace
    runs; tied ones stay tied."""
    # Keyed by identity; the originals are kept so that none is freed and its identity taken over by another.
    fakes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    fakes[id(tensor)] = (tensor, fake)
                tensors[name] = fakes[id(tensor)][1]


def count_clap(clap: PreTrainedModel) -> list[Part]:
    """CLAP's parts; it is frozen."""
    audio, text = (sum(p.numel() for p in tower.parameters()) for tower in (clap.audio_model, clap.text_model))
    rest = sum(p.numel() for p in clap.parameters()) - audio - text
    return [Part("CLAP's audio tower", audio), Part("CLAP's text tower", text), Part("CLAP's projections", rest)]


def count_model(model: MatsForConditionalGeneration) -> list[Part]:
    """The parts of the model itself; parameters that are shared count once."""
    groups: dict[str, list[nn.Parameter]] = {"mapper": [], "language model": [], "LoRA adapters": []}
    for name, parameter in model.named_parameters():
        group = "mapper" if name.startswith("mapper.") else "LoRA adapters" if is_lora_name(name) else "language model"
        groups[group].append(parameter)
    return [
        Part(name, sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))
        for name, parameters in groups.items()
        if parameters
    ]


# -- Memory ------------------------------------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, real or fake ones, apart from those that were there before.

    A storage counts from the operation that made it until its last reference is gone, once, however many views there
    are of it. `peak` is the most that was alive at once.
    """

    def __init__(self, before: Iterable[torch.Tensor]):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in before}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class StepTrace:
    """Bytes that a micro-batch takes beside parameters, their gradients and the optimizer.

    Attributes:
        kept (`int`): what the forward pass keeps for the backward pass, up to the head.
        peak (`int`): the most at any time.
    """

    kept: int
    peak: int


def trace_step(
    model: MatsForConditionalGeneration,
    rows: int,
    length: int,
    answer: int,
    compute: torch.dtype | None = None,
    checkpointing: bool = False,
) -> StepTrace:
    """Runs one micro-batch forward and backward and counts what is alive.

    For a closed form (Korthikanti et al., 2022, "Reducing Activation Recomputation in Large Transformer Models") one
    would say that a layer keeps 34·s·b·h bytes in halves, or with checkpointing its input alone, 2·s·b·h. That assumes
    one architecture, one implementation of it, and that all weights are trained; here most are frozen and keep no
    input, adapters keep theirs, GPT-2's GELU is made of eight operations that all keep something, and autocast copies
    weights. So the step itself is run, by the same code as in training, and its tensors are counted: with fake tensors
    in any size, with real ones in order to check it.

    It is the CPU's step. A GPU's differs a little: autocast keeps the normalisations in float32 there, and the
    allocator rounds sizes up.

    Args:
        model (`MatsForConditionalGeneration`): put into training mode.
        rows, length, answer (`int`): rows, their positions, and how many of these, at the end, have labels.
        compute (`torch.dtype`, *optional*): of autocast.
        checkpointing (`bool`): whether the layers' activations are computed again in the backward pass.
    """
    model.train()
    if checkpointing:
        # As TrainingArguments has it by default.
        model.activation_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # as from the micro-batch before
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    inputs = _inputs(model, rows, length)
    labels = torch.zeros(rows * answer, dtype=torch.long)
    with LiveMemory([*model.parameters(), *model.buffers(), *gradients, *inputs, labels]) as memory:
        with torch.autocast("cpu", dtype=compute, enabled=compute is not None):
            hidden_states = _decode(model, *inputs)
            kept = memory.live
            logits = model.get_output_embeddings()(hidden_states[:, -answer:].flatten(0, 1))
            loss = F.cross_entropy(logits.float(), labels)
        del hidden_states, logits
        loss.backward()
    return StepTrace(kept, memory.peak)


def trace_evaluation(
    model: MatsForConditionalGeneration, rows: int, length: int, compute: torch.dtype | None = None
) -> StepTrace:
    """What is alive while one batch is evaluated; see [`trace_step`].

    Outside of training the model gives the logits of every position.
    """
    inputs = _inputs(model.eval(), rows, length)
    labels = torch.zeros(rows * length, dtype=torch.long)
    with (
        LiveMemory([*model.parameters(), *model.buffers(), *inputs, labels]) as memory,
        torch.no_grad(),
        torch.autocast("cpu", dtype=compute, enabled=compute is not None),
    ):
        hidden_states = _decode(model, *inputs)
        kept = memory.live
        logits = model.get_output_embeddings()(hidden_states)
        F.cross_entropy(logits.float().flatten(0, 1), labels)
    return StepTrace(kept, memory.peak)


def trace_few_layers(
    model: MatsForConditionalGeneration, trace: Callable[[MatsForConditionalGeneration], StepTrace]
) -> StepTrace:
    """`trace(model)`, which takes two and four layers to say what it would be with all, if these are all alike.

    Each layer keeps the same, and the fullest moment is at the end of them, so that both figures grow evenly with
    their number. `model` is on the meta device, and is left with fake tensors and few layers.
    """
    layers = _equal_layers(model)
    with FakeTensorMode():
        fill_with_fakes(model)
        if layers is None or len(layers) <= 4:
            return trace(model)
        number = len(layers)
        del layers[4:]
        four = trace(model)
        del layers[2:]
        two = trace(model)
    more = (number - 4) / 2
    return StepTrace(round(four.kept + more * (four.kept - two.kept)), round(four.peak + more * (four.peak - two.peak)))


def _equal_layers(model: MatsForConditionalGeneration) -> nn.ModuleList | None:
    """The language model's layers, or `None` where they are of different kinds or in several lists."""
    lists = [
        module
        for module in model.language_model.modules()
        if isinstance(module, nn.ModuleList) and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(lists) != 1 or len(set(getattr(model.config.text_config, "layer_types", None) or [])) > 1:
        return None
    shapes = [[(name, p.shape, p.dtype) for name, p in layer.named_parameters()] for layer in lists[0]]
    return lists[0] if all(shape == shapes[0] for shape in shapes) else None


def _inputs(model: MatsForConditionalGeneration, rows: int, length: int) -> tuple[torch.Tensor, ...]:
    """One audio a row `(rows, dim)`, tokens behind it `(rows, length - num_audio_tokens)`, a mask `(rows, length)`."""
    text = length - model.config.num_audio_tokens
    if text < 1:
        raise ValueError(f"Rows of {length} positions have no room for an audio of {model.config.num_audio_tokens}.")
    return (
        torch.ones(rows, model.config.audio_embed_dim),
        torch.zeros(rows, text, dtype=torch.long),
        torch.ones(rows, length, dtype=torch.long),
    )


def _decode(
    model: MatsForConditionalGeneration, embeds: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """The model's forward pass up to the head `(rows, length, hidden)`.

    It leaves out the checks, which read the data, and has the audio in front: where it really is, is data, too.
    """
    prefix = model.mapper(model.noise(embeds))
    text = model.get_input_embeddings()(input_ids)
    return model.get_decoder()(
        inputs_embeds=torch.cat([prefix.to(text.dtype), text], dim=1),
        attention_mask=attention_mask,
        position_ids=attention_mask.cumsum(-1) - 1,
        use_cache=False,
    )[0]


class MemoryPlan:
    """The memory of a device in a recipe's training and evaluation, in any setup."""

    def __init__(self, recipe: Recipe, text_config: PreTrainedConfig, embed_dim: int, lengths: RowLengths):
        self.arguments, self.run = recipe.model, recipe.run
        self.text_config, self.embed_dim, self.lengths = text_config, embed_dim, lengths
        self._traces: dict[Setup, StepTrace] = {}

    def model(self, setup: Setup) -> MatsForConditionalGeneration:
        """The model on the meta device."""
        return build_model(self.arguments, self.text_config, self.embed_dim, setup)

    def trace(self, setup: Setup) -> StepTrace:
        """The trace of a micro-batch, which is the same however weights are stored and dealt out."""
        key = replace(setup, bits=None, devices=1, sharded=False)
        if key not in self._traces:
            step = partial(
                trace_step,
                rows=key.rows,
                length=self.lengths.longest,
                answer=self.lengths.answer,
                compute=key.compute,
                checkpointing=key.checkpointing,
            )
            self._traces[key] = trace_few_layers(self.model(key), step)
        return self._traces[key]

    def training(self, setup: Setup) -> Phase:
        """All that is there at the fullest moment of training."""
        model, trace = self.model(setup), self.trace(setup)
        stored = _stored(model, setup, self.run)
        gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        needs = [*stored, Need("gradients", gradients // (setup.devices if setup.sharded else 1))]
        if setup.devices > 1 and not setup.sharded:
            needs.append(Need("gradients on their way between the devices", gradients))
        labels, length = f"{setup.rows} x {self.lengths.answer}", f"{setup.rows} x {self.lengths.longest}"
        needs.append(Need(f"activations of {length} positions", trace.kept, exact=False))
        needs.append(Need(f"logits of {labels} labels, backward pass", trace.peak - trace.kept, exact=False))
        return Phase(TRAINING, tuple(needs))

    def evaluation(self, setup: Setup) -> Phase:
        """All that is there at the fullest moment of evaluation, when there are no gradients."""
        model, rows, length = self.model(setup), self.run.per_device_eval_batch_size, self.lengths.longest
        stored = _stored(model, setup, self.run)
        trace = trace_few_layers(model, partial(trace_evaluation, rows=rows, length=length, compute=setup.compute))
        return Phase(EVALUATION, (*stored, Need(f"{rows} x {length} positions with logits", trace.peak, exact=False)))


def _stored(model: MatsForConditionalGeneration, setup: Setup, run: RunArguments) -> list[Need]:
    """What lies in a device's memory all the time, from the first step on. `model` is on the meta device."""
    shards = setup.devices if setup.sharded else 1
    own = {name: p for name, p in model.named_parameters() if is_lora_name(name) or name.startswith("mapper.")}
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    precision = f"{setup.bits} bits" if setup.bits else _name(model.get_input_embeddings().weight.dtype)
    adapters = "mapper and LoRA" if any(map(is_lora_name, own)) else "mapper"
    needs = [
        Need(f"language model, {precision}", language_model_bytes(model, setup.bits) // shards),
        Need(f"{adapters}, float32", sum(p.nbytes for p in own.values()) // shards),
    ]
    optimizer = str(getattr(run.optim, "value", run.optim))
    if optimizer in FULL_ADAMW:
        needs.append(Need("AdamW's two moments", 2 * trained // shards))
    else:
        needs.append(Need(f"AdamW's two moments, in place of {optimizer}", 2 * trained // shards, exact=False))
    if setup.sharded:
        needs.append(Need("layers that FSDP puts together for a moment", gathered_bytes(model), exact=False))
    if setup.bits:
        widest = max(layer.weight.numel() for layer in quantised_layers(model))
        needs.append(Need("a layer's weights, out of their quantisation", 2 * widest, exact=False))
    return needs


def language_model_bytes(model: MatsForConditionalGeneration, bits: int | None) -> int:
    """The language model's own weights, in `bits` where they are to be quantised."""
    total = sum(p.nbytes for name, p in model.language_model.named_parameters() if not is_lora_name(name))
    if bits is None:
        return total
    for layer in quantised_layers(model):
        weight = layer.weight
        scales = weight.numel() // NF4_BLOCK if bits == 4 else max(weight.shape)
        total += weight.numel() * bits // 8 + 4 * scales - weight.nbytes
    return total


def quantised_layers(model: MatsForConditionalGeneration) -> list[nn.Module]:
    """What bitsandbytes quantises: linear layers but the head."""
    head = model.get_output_embeddings()
    return [
        module
        for name, module in model.language_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not is_lora_name(name)
    ]


def gathered_bytes(model: MatsForConditionalGeneration) -> int:
    """What FSDP holds whole: two of the units that it wraps, one in use and the next on its way, and all outside."""
    units = [m for m in model.language_model.modules() if isinstance(m, GradientCheckpointingLayer)] + [model.mapper]
    sizes = [sum(p.nbytes for p in unit.parameters()) for unit in units]
    return sum(p.nbytes for p in model.parameters()) - sum(sizes) + 2 * max(sizes)


def caching_phase(clap: PreTrainedModel, by_audio: bool) -> Phase:
    """The memory of a device while CLAP encodes, before training. `clap` is on the meta device, in float32."""
    weights = sum(tensor.nbytes for tensor in (*clap.parameters(), *clap.buffers()))
    config = clap.config
    with FakeTensorMode(), torch.no_grad():
        fill_with_fakes(clap.eval())
        if by_audio:
            tower = config.audio_config
            # The most frames that the tower's square picture of a spectrogram has room for.
            frames = tower.spec_size * (tower.spec_size // tower.num_mel_bins)
            inputs = {"input_features": torch.empty(WINDOWS_AT_A_TIME, 1, frames, tower.num_mel_bins)}
            if not isinstance(config, MsClapConfig):
                inputs["is_longer"] = torch.zeros(WINDOWS_AT_A_TIME, 1, dtype=torch.bool)
            encode, what = clap.get_audio_features, f"{WINDOWS_AT_A_TIME} windows in the audio tower"
        else:
            # RoBERTa's positions begin behind its padding id, so a text has two fewer.
            tokens = getattr(config, "max_text_tokens", None) or config.text_config.max_position_embeddings - 2
            inputs = {
                "input_ids": torch.zeros(TEXTS_AT_A_TIME, tokens, dtype=torch.long),
                "attention_mask": torch.ones(TEXTS_AT_A_TIME, tokens, dtype=torch.long),
            }
            encode, what = clap.get_text_features, f"{TEXTS_AT_A_TIME} texts of {tokens} tokens in the text tower"
        with LiveMemory([*clap.parameters(), *clap.buffers()]) as memory:
            encode(**inputs)
    return Phase(CACHING, (Need("CLAP, float32", weights), Need(what, memory.peak, exact=False)))


def find_remedies(
    arguments: ModelArguments, setup: Setup, usable: int, size_of: Callable[[Setup], int]
) -> tuple[Remedy, ...]:
    """Changes that each take memory away; where none of them is enough, all at once; and more devices.

    Args:
        usable (`int`): bytes that training may take.
        size_of: bytes that it takes in a setup.
    """
    remedies, together, size = [], setup, size_of(setup)
    for text, change in _changes(arguments, setup):
        if (changed := size_of(replace(setup, **change))) < size:
            remedies.append(Remedy(text, changed))
            together = replace(together, **change)
    if setup.rows > 1:
        rows = _largest_micro_batch(setup, usable, size_of)
        remedies.append(Remedy(f"per_device_train_batch_size: {rows}", size_of(replace(setup, rows=rows))))
        together = replace(together, rows=rows)
    if len(remedies) > 1 and all(remedy.size > usable for remedy in remedies):
        remedies.append(Remedy("all of these at once", size_of(together)))
    if not setup.on_cpu:
        devices, size = _fewest_devices(setup, usable, size_of)
        remedies.append(Remedy(f"--fsdp on {_devices(devices)}", size))
        if all(remedy.size > usable for remedy in remedies):
            devices, size = _fewest_devices(together, usable, size_of)
            remedies.append(Remedy(f"all of these and --fsdp on {_devices(devices)}", size))
    return tuple(remedies)


def _changes(arguments: ModelArguments, setup: Setup) -> Iterator[tuple[str, dict]]:
    """Fields of the recipe that take memory away, and the same in a setup."""
    if not setup.checkpointing:
        yield "activation_checkpointing: true", {"checkpointing": True}
    if setup.compute is None:
        yield "bf16: true", {"compute": torch.bfloat16}
    if arguments.train_language_model:
        return
    if setup.weights == torch.float32 and not setup.bits:
        yield "language_model_dtype: bfloat16", {"weights": torch.bfloat16}
    if setup.bits != 4 and not setup.on_cpu:
        yield "load_in_4bit: true, language_model_dtype: bfloat16", {"bits": 4, "weights": torch.bfloat16}


def _largest_micro_batch(setup: Setup, usable: int, size_of: Callable[[Setup], int]) -> int:
    """Rows of the largest smaller micro-batch that fits, by halving; 1 where none does."""
    # The peak is the largest of sums that grow evenly with the rows, so between 1 and all it is below a straight line.
    least, most = size_of(replace(setup, rows=1)), size_of(setup)
    rows = setup.rows // 2
    while rows > 1 and least + (most - least) * (rows - 1) / (setup.rows - 1) > usable:
        rows //= 2
    return rows


def _fewest_devices(setup: Setup, usable: int, size_of: Callable[[Setup], int]) -> tuple[int, int]:
    """Devices over which FSDP makes it fit, at most `MOST_DEVICES`, and the bytes of each."""
    devices = setup.devices if setup.sharded else max(2, setup.devices)
    while (size := size_of(replace(setup, sharded=True, devices=devices))) > usable and devices < MOST_DEVICES:
        devices *= 2
    return devices, size


# -- Small things ------------------------------------------------------------------------------------------------------


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


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count else "-"


def _gigabytes(size: int) -> str:
    return f"{size / GB:,.2f}"


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["Plan", "plan"]
