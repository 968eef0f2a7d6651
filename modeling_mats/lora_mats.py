"""LoRA within the language model: PEFT's layers, put there in place, so that MATS stays an ordinary `PreTrainedModel`.

PEFT is imported only where LoRA is used, so that models without it need no such package.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# The start of the names that PEFT gives to what it adds: lora_A, lora_B, lora_embedding_A, lora_magnitude_vector, ...
LORA_PREFIX = "lora_"
# What would change the language model itself, whose weights a light checkpoint takes from elsewhere.
SELF_CHANGING = ("layer_replication", "loftq_config", "modules_to_save", "trainable_token_indices")
# Others, such as PiSSA, take what they start from out of the language model's weights.
HARMLESS_INITS = (True, False, "gaussian")


class MatsLoraMixin:
    """LoRA of [`MatsForConditionalGeneration`]."""

    @property
    def has_lora(self) -> bool:
        """Whether there is LoRA in the language model, by `add_lora` or from a light checkpoint."""
        return self.config.lora is not None

    def add_lora(
        self,
        r: int = 8,
        lora_alpha: int = 32,
        lora_dropout: float = 0.1,
        target_modules: str | Iterable[str] = "auto",
        **lora_kwargs,
    ) -> Self:
        """Freezes the language model and adds LoRA to it, in place; mapper and LoRA, in float32, are left to train.

        Args:
            r, lora_alpha, lora_dropout: the paper's by default.
            target_modules (`str` or iterable of `str`):
                Layers of the language model: `"auto"`, PEFT's choice for the architecture or else the attention's
                linear layers; `"all-linear"`, all but the head; names or ends of names; a regular expression.
            **lora_kwargs: further fields of `peft.LoraConfig`, such as `use_dora=True`.

        Returns:
            `MatsForConditionalGeneration`: this model.

        Raises:
            ImportError: PEFT is not installed.
            ValueError: there is LoRA already, a target is not there, or settings that would change the language model
                itself.
        """
        if self.has_lora:
            raise ValueError("This model has LoRA already; call merge_lora() first.")
        settings = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, **lora_kwargs}
        settings = resolve_lora(self.language_model, target_modules, settings)
        inject_lora(self.language_model, settings)
        self.mapper.float().requires_grad_(True)
        self.config.lora = settings
        return self

    def merge_lora(self) -> Self:
        """Adds LoRA to the language model's weights and removes its layers, in place.

        The language model is no other's then: `config.language_model_name_or_path` is `None`, checkpoints are whole.

        Raises:
            ValueError: there is no LoRA, or the language model is quantised.
        """
        if not self.has_lora:
            raise ValueError("This model has no LoRA to merge; add_lora() adds it.")
        merge_lora_layers(self.language_model)
        self.config.lora, self.config.light = None, False
        self.config.language_model_name_or_path = self.config.language_model_revision = None
        return self


def is_lora_name(name: str) -> bool:
    """Whether an entry of a state dict belongs to LoRA."""
    return any(part.startswith(LORA_PREFIX) for part in name.split("."))


def find_lora_targets(language_model: PreTrainedModel) -> list[str]:
    """Names of the layers that LoRA usually goes to in a language model, as PEFT's `target_modules` takes them.

    PEFT's own choice for the architecture where it has one (GPT-2: `c_attn`; Llama: `q_proj` and `v_proj`), else the
    linear layers of the attention, else all but the head.

    Raises:
        ValueError: no linear layer is to be found.
    """
    known = _import_peft().utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = known.get(language_model.config.model_type)
    names = [name for name, _ in language_model.named_modules()]
    if isinstance(targets, list) and all(_matching(target, names) for target in targets):
        return sorted(targets)
    linear = _linear_names(language_model)
    attention = [name for name in linear if "attn" in name.lower() or "attention" in name.lower()]
    return _shortened(attention or linear, linear)


def resolve_lora(language_model: PreTrainedModel, target_modules: str | Iterable[str], settings: dict) -> dict:
    """Settings of `peft.LoraConfig` as plain JSON, with the target modules by name; refuses what would get lost.

    Args:
        language_model (`PreTrainedModel`): without LoRA.
        target_modules (`str` or iterable of `str`):
            `"auto"` (see `find_lora_targets`), `"all-linear"` (all linear layers but the head), names, or a regular
            expression that matches whole names.
        settings (`dict`): further fields of `peft.LoraConfig`.

    Raises:
        TypeError: a field that LoRA does not have.
        ValueError: a target that is not there, or settings that would change the language model itself.
    """
    if target_modules == "auto":
        targets = find_lora_targets(language_model)
    elif target_modules == "all-linear":
        linear = _linear_names(language_model)
        targets = _shortened(linear, linear)
    else:
        targets = target_modules if isinstance(target_modules, str) else sorted(target_modules)
    if changing := [name for name in SELF_CHANGING if settings.get(name) is not None]:
        raise ValueError(
            f"{', '.join(changing)} would change the language model itself, of which a checkpoint with LoRA keeps "
            "nothing."
        )
    if (bias := settings.get("bias", "none")) != "none":
        raise ValueError(
            f"bias is {bias!r}, expected 'none': a checkpoint with LoRA does not keep the language model's own biases."
        )
    if (init := settings.get("init_lora_weights", True)) not in HARMLESS_INITS:
        raise ValueError(
            f"init_lora_weights is {init!r}, which changes the weights of the language model itself; expected one of "
            f"{', '.join(map(repr, HARMLESS_INITS))}."
        )
    try:
        resolved = json.loads(json.dumps({**settings, "target_modules": targets}))
    except TypeError as error:
        raise TypeError(f"LoRA's settings are written to config.json, which cannot hold these: {error}") from error
    _peft_config(language_model, resolved)
    return resolved


def inject_lora(language_model: PreTrainedModel, settings: dict) -> None:
    """Puts LoRA into a language model, in place: adapters in training, everything else frozen.

    Adapters are float32 where the language model is in halves or quantised, as PEFT does it: they are what is trained.

    Args:
        language_model (`PreTrainedModel`): without LoRA.
        settings (`dict`): from `resolve_lora`.

    Raises:
        ValueError: the language model has LoRA already, parts of it are offloaded, or a target is not there.
    """
    if any(is_lora_name(name) for name, _ in language_model.named_parameters()):
        raise ValueError("The language model has LoRA layers already; merge or remove them first.")
    if any(parameter.is_meta for parameter in language_model.parameters()):
        raise ValueError(
            "Parts of the language model are offloaded to the CPU's memory or the disk, where LoRA cannot be added. "
            "Take a device_map that fits, or merge the LoRA (mats merge) and load the whole checkpoint."
        )
    language_model.requires_grad_(False)
    language_model.add_adapter(_peft_config(language_model, settings))
    for name, parameter in language_model.named_parameters():
        if is_lora_name(name) and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    language_model.train(language_model.training)  # the new layers come in training mode


def merge_lora_layers(language_model: PreTrainedModel) -> None:
    """Adds LoRA to the weights that it stands beside and removes its layers, in place.

    Raises:
        ValueError: the language model is quantised, or a merged weight is not finite.
    """
    if is_quantized(language_model):
        raise ValueError(
            "LoRA cannot be merged into a quantised language model without loss: load it without quantization_config "
            "and merge then."
        )
    tuner_layer = _import_peft().tuners.tuners_utils.BaseTunerLayer
    layers = {name: module for name, module in language_model.named_modules() if isinstance(module, tuner_layer)}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        if any(outer != name and name.startswith(f"{outer}.") for outer in layers):
            continue  # inside another one, which brings it along
        if hasattr(layer, "unload_and_optionally_merge_module"):
            merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            layer.merge(safe_merge=True)
            merged = layer.get_base_layer()
        setattr(language_model.get_submodule(parent), child, merged)
    # What transformers' own adapter methods look at.
    del language_model.peft_config
    language_model._hf_peft_config_loaded = False


def is_quantized(language_model: PreTrainedModel) -> bool:
    """Whether a language model was loaded quantised (bitsandbytes, GPTQ, ...)."""
    return getattr(language_model, "hf_quantizer", None) is not None


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs the package peft (0.20 or newer): pip install 'peft>=0.20'.") from error
    return peft


def _peft_config(language_model: PreTrainedModel, settings: dict) -> Any:
    """The `peft.LoraConfig` of settings, after a look at whether every target is there."""
    modules = dict(language_model.named_modules())
    targets = settings["target_modules"]
    if isinstance(targets, str):
        found = {targets: [name for name in modules if re.fullmatch(targets, name)]}
    else:
        found = {target: _matching(target, modules) for target in targets}
    if not found:
        raise ValueError("target_modules is empty, expected at least one name.")
    if missing := [target for target, names in found.items() if not names]:
        linear = _linear_names(language_model)
        raise ValueError(
            f"The language model ({language_model.config.model_type}) has no layers named {', '.join(missing)}; its "
            f"linear layers are {', '.join(_shortened(linear, linear))}."
        )
    chosen = [modules[name] for names in found.values() for name in names]
    tables = {language_model.get_input_embeddings(), language_model.get_output_embeddings()}
    if language_model.config.tie_word_embeddings and not tables.isdisjoint(chosen):
        raise ValueError(
            "LoRA on the embedding table or on the head cannot be merged where these two are one: drop it."
        )
    # GPT-2's Conv1D keeps its weight transposed.
    transposed = any(isinstance(module, Conv1D) for module in chosen)
    return _import_peft().LoraConfig(**{"fan_in_fan_out": transposed, **settings})


def _matching(target: str, names: Iterable[str]) -> list[str]:
    """PEFT's rule: a target is a whole name, or its end behind a dot."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _linear_names(language_model: PreTrainedModel) -> list[str]:
    """Every linear layer but the head. Quantised ones are subclasses of `nn.Linear` (bitsandbytes)."""
    head = language_model.get_output_embeddings()
    names = [
        name
        for name, module in language_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    if not names:
        raise ValueError(f"{type(language_model).__name__} has no linear layers that LoRA could go to; name targets.")
    return names


def _shortened(chosen: list[str], linear: list[str]) -> list[str]:
    """The shortest ends of names that mean the chosen layers and no others."""
    others = set(linear) - set(chosen)
    ends = set()
    for name in chosen:
        parts = name.split(".")
        candidates = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        ends.add(next(end for end in candidates if not _matching(end, others)))
    return sorted(ends)


__all__ = [
    "MatsLoraMixin",
    "find_lora_targets",
    "inject_lora",
    "is_lora_name",
    "is_quantized",
    "merge_lora_layers",
    "resolve_lora",
]
