"""The memory of a device in each phase of a run: what lies in it all the time, and what a step adds."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from configuration_mats import MsClapConfig
from modeling_mats import MatsForConditionalGeneration
from modeling_mats.lora_mats import is_lora_name
from training.dry_run.model import build_model, fill_with_fakes
from training.dry_run.report import CACHING, EVALUATION, TRAINING, Need, Phase, RowLengths, Setup
from training.dry_run.trace import LiveMemory, StepTrace, trace_evaluation, trace_few_layers, trace_step
from training.recipe import Recipe, RunArguments

# As embed_texts and embed_clips take them.
TEXTS_AT_A_TIME, WINDOWS_AT_A_TIME = 64, 8
# bitsandbytes: NF4 has a float32 scale for every 64 values, LLM.int8 one for every output.
NF4_BLOCK = 64
# Optimizers whose state is two moments in the parameters' own precision.
FULL_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused")


class MemoryPlan:
    """The memory of a device in a recipe's training and evaluation, in any setup."""

    def __init__(self, recipe: Recipe, text_config: PreTrainedConfig, embed_dim: int, lengths: RowLengths):
        self.arguments, self.run = recipe.model, recipe.run
        self.text_config, self.embed_dim, self.lengths = text_config, embed_dim, lengths
        self._models: dict[torch.dtype, MatsForConditionalGeneration] = {}
        self._traces: dict[Setup, StepTrace] = {}

    def model(self, setup: Setup) -> MatsForConditionalGeneration:
        """The model on the meta device, to be counted; it is the same for every setup with these weights."""
        if setup.weights not in self._models:
            self._models[setup.weights] = self._new_model(setup)
        return self._models[setup.weights]

    def _new_model(self, setup: Setup) -> MatsForConditionalGeneration:
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
            self._traces[key] = trace_few_layers(self._new_model(key), step)
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
        stored = _stored(self.model(setup), setup, self.run)
        rows, length = self.run.per_device_eval_batch_size, self.lengths.longest
        step = partial(trace_evaluation, rows=rows, length=length, compute=setup.compute)
        trace = trace_few_layers(self._new_model(setup), step)
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
