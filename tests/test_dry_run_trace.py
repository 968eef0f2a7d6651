"""What dry runs say of memory and parameters, against real steps of real models."""

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from run_parts import MAPPER
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from configuration_mats import MatsConfig
from modeling_mats import MatsForConditionalGeneration
from training.dry_run import (
    LiveMemory,
    Setup,
    StepTrace,
    build_model,
    count_model,
    fill_with_fakes,
    find_text_config,
    language_model_bytes,
    quantised_layers,
    trace_evaluation,
    trace_few_layers,
    trace_step,
)
from training.recipe import ModelArguments

AUDIO = MAPPER["num_audio_tokens"]
EMBED_DIM = 32
SIZES = {
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
}
ROWS, LENGTH, ANSWER = 3, 48, 20
SETUP = Setup(
    weights=torch.float32,
    bits=None,
    compute=None,
    checkpointing=False,
    rows=ROWS,
    devices=1,
    sharded=False,
    on_cpu=True,
)


def arguments_for(kind: str, **fields) -> ModelArguments:
    return ModelArguments(language_model="somewhere/else", text_config=SIZES[kind], lora_r=4, **MAPPER, **fields)


def text_config_for(kind: str):
    return AutoConfig.for_model(**SIZES[kind], vocab_size=500, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def real_model(kind: str, weights: torch.dtype, attention: str | None) -> MatsForConditionalGeneration:
    """What `training.language_side` would make of the arguments."""
    own = {} if attention is None else {"attn_implementation": attention}
    config = MatsConfig(
        text_config=text_config_for(kind), audio_token_id=499, audio_embed_dim=EMBED_DIM, **MAPPER, **own
    )
    model = MatsForConditionalGeneration(config)
    model.language_model.to(weights)
    model.freeze_language_model()
    return model.add_lora(r=4)


def traced(trace: Callable, kind: str, setup: Setup, attention: str | None, *arguments):
    """`trace` of a model at the sizes of `real_model`, without weights."""
    planned = arguments_for(kind, attn_implementation=attention)
    model = build_model(planned, text_config_for(kind), EMBED_DIM, setup)
    with FakeTensorMode():
        fill_with_fakes(model)
        return trace(model, *arguments)


def real_inputs() -> dict[str, torch.Tensor]:
    """A batch as the collator makes it, with padding in its last row."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 400, (ROWS, LENGTH), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, :5] = 0
    input_ids[:, 6 : 6 + AUDIO] = 499
    labels = torch.full_like(input_ids, -100)
    labels[:, -ANSWER:] = input_ids[:, -ANSWER:]
    embeds = F.normalize(torch.randn(ROWS, 1, EMBED_DIM, generator=generator), dim=-1)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "audio_embeds": embeds}


def live_at_most(model: MatsForConditionalGeneration, compute: torch.dtype | None, train: bool) -> int:
    """The most bytes alive in a real step of the model's own forward pass, beside parameters and gradients."""
    inputs = real_inputs()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with LiveMemory([*model.parameters(), *model.buffers(), *gradients, *inputs.values()]) as memory:
        with torch.set_grad_enabled(train), torch.autocast("cpu", dtype=compute, enabled=compute is not None):
            loss = model(**inputs, use_cache=False).loss
        if train:
            loss.backward()
    return memory.peak


# -- Memory, against real steps ----------------------------------------------------------------------------------------


def test_live_memory_counts_storages_while_they_live():
    before = torch.zeros(100)
    with LiveMemory([before]) as memory:
        first = torch.zeros(10)  # 40 bytes
        view = first.view(2, 5)[1]
        before.add_(1)
        assert memory.live == 40
        del first
        assert memory.live == 40  # the view holds all of it
        second = torch.zeros(5, dtype=torch.float64)
        del view
        assert memory.live == 40
        del second
    assert (memory.live, memory.peak) == (0, 80)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("weights", "compute", "attention"),
    [
        (torch.float32, None, None),
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.bfloat16, None, "eager"),
    ],
)
@pytest.mark.parametrize("kind", list(SIZES))
def test_a_step_is_traced_as_it_is(kind, weights, compute, attention, checkpointing):
    model = real_model(kind, weights, attention).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    measured = live_at_most(model, compute, train=True)
    setup = dataclasses.replace(SETUP, weights=weights)
    trace = traced(trace_step, kind, setup, attention, ROWS, LENGTH, ANSWER, compute, checkpointing)
    assert trace.peak == pytest.approx(measured, rel=0.03)
    assert 0 < trace.kept < trace.peak


@pytest.mark.parametrize("kind", list(SIZES))
def test_an_evaluation_is_traced_as_it_is(kind):
    measured = live_at_most(real_model(kind, torch.float32, None).eval(), torch.bfloat16, train=False)
    trace = traced(trace_evaluation, kind, SETUP, None, ROWS, LENGTH, torch.bfloat16)
    # The forward pass holds on to its inputs a little longer, which shows at these sizes.
    assert trace.peak == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(SIZES))
def test_few_layers_tell_of_many(kind, checkpointing):
    text_config = text_config_for(kind)
    text_config.num_hidden_layers = 9
    traces = []
    for trace in (trace_few_layers, trace_all_layers):
        model = build_model(arguments_for(kind), text_config, EMBED_DIM, SETUP)
        step = partial(trace_step, rows=ROWS, length=LENGTH, answer=ANSWER, checkpointing=checkpointing)
        traces.append(trace(model, step))
    assert traces[0] == traces[1]


def trace_all_layers(model, trace):
    with FakeTensorMode():
        fill_with_fakes(model)
        return trace(model)


def test_layers_of_different_kinds_are_all_traced():
    own = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8, "use_sliding_window": True}
    text_config = AutoConfig.for_model(**{**SIZES["llama"], "model_type": "qwen2", "num_hidden_layers": 6}, **own)
    model = build_model(arguments_for("llama"), text_config, EMBED_DIM, SETUP)
    seen = []

    def trace(model):
        seen.append(sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules()))
        return StepTrace(1, 2)

    assert trace_few_layers(model, trace) == StepTrace(1, 2) and seen == [6]


@pytest.mark.parametrize("kind", list(SIZES))
def test_what_the_forward_pass_keeps_is_what_autograd_saves(kind):
    model = real_model(kind, torch.float32, None).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**real_inputs(), use_cache=False)
    logits = output.logits.nbytes  # saved as log-probabilities, behind the head
    trace = trace_step(real_model(kind, torch.float32, None), ROWS, LENGTH, ANSWER)
    assert trace.kept == pytest.approx(sum(saved.values()) - logits, rel=0.1)


def test_fused_attention_of_gpus_keeps_no_square():
    kept = {}
    for on_cpu in (True, False):
        setup = dataclasses.replace(SETUP, on_cpu=on_cpu)
        for length in (40, 80):
            # GPT-2 has dropout in its attention.
            kept[on_cpu, length] = traced(trace_step, "gpt2", setup, None, ROWS, length, ANSWER).kept
    heads, layers = 4, 3
    square = ROWS * heads * layers * 4
    assert kept[False, 80] < 2.1 * kept[False, 40]
    assert kept[True, 80] - kept[False, 80] > square * 80**2


def test_rows_without_room_for_audio():
    with pytest.raises(ValueError, match="no room for an audio of 4"):
        trace_step(real_model("gpt2", torch.float32, None), 1, 4, 1)


# -- Parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SIZES))
def test_parameters_are_those_of_a_real_model(kind):
    setup = dataclasses.replace(SETUP, weights=torch.bfloat16)
    planned = build_model(arguments_for(kind), text_config_for(kind), EMBED_DIM, setup)
    made = real_model(kind, torch.bfloat16, None)
    expected = {name: (p.shape, p.dtype, p.requires_grad) for name, p in made.named_parameters()}
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in planned.named_parameters()} == expected
    assert all(parameter.is_meta for parameter in planned.parameters())
    parts = {part.name: part for part in count_model(planned)}
    assert parts["language model"].trained == 0
    assert parts["LoRA adapters"].trained == parts["LoRA adapters"].parameters > 0
    assert sum(part.parameters for part in parts.values()) == sum(p.numel() for p in made.parameters())


def test_a_new_language_model_is_trained_whole():
    arguments = ModelArguments(text_config=SIZES["llama"], train_language_model=True, lora_r=0, **MAPPER)
    text_config, origin = find_text_config(arguments)
    assert text_config.vocab_size == arguments.new_vocab_size + 1 and "new" in origin
    parts = count_model(build_model(arguments, text_config, EMBED_DIM, SETUP))
    assert [part.name for part in parts] == ["mapper", "language model"]
    assert all(part.trained == part.parameters for part in parts)


def test_tied_weights_stay_tied():
    def tied(model):
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    assert traced(tied, "gpt2", SETUP, None)


def test_bytes_of_quantised_weights():
    setup = dataclasses.replace(SETUP, weights=torch.bfloat16)
    model = build_model(arguments_for("llama"), text_config_for("llama"), EMBED_DIM, setup)
    layers = quantised_layers(model)
    assert len(layers) == 3 * 7
    linear = sum(layer.weight.numel() for layer in layers)
    other = 2 * 500 * 64 + (2 * 3 + 1) * 64  # embeddings, head, norms
    assert language_model_bytes(model, None) == 2 * (linear + other)
    assert language_model_bytes(model, 4) == linear // 2 + 4 * linear // 64 + 2 * other
    assert linear + 2 * other < language_model_bytes(model, 8) < 1.1 * linear + 2 * other
