"""What a step keeps in memory, found by running it."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_mats import MatsForConditionalGeneration
from training.dry_run.model import fill_with_fakes


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
