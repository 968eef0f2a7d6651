"""Checkpoints, whole and light. A light one is all but the language model's own weights, and says where those are."""

import copy
import os
import re
from typing import Any, Self

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from modeling_mats.language_model_mats import (
    HUB_ARGUMENTS,
    is_local_location,
    joint_device_map,
    load_language_model,
    read_location,
    split_device_map,
    written_location,
)
from modeling_mats.lora_mats import is_lora_name, is_quantized

MAPPER_PREFIX = "mapper."
# Arguments of from_pretrained that hold for the checkpoint's own files alone.
OWN_ARGUMENTS = ("revision", "subfolder")


def is_light_name(name: str) -> bool:
    """Whether an entry of the model's state dict is in light checkpoints: the mapper's and LoRA's are."""
    return name.startswith(MAPPER_PREFIX) or is_lora_name(name)


class MatsCheckpointMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of [`MatsForConditionalGeneration`]."""

    @classmethod
    def _around(cls, language_model: PreTrainedModel, config: PreTrainedConfig, mapper_device: Any = None) -> Self:
        """A model with a loaded language model inside and a fresh mapper, by default beside its first layer."""
        attention, experts = language_model.config._attn_implementation, language_model.config._experts_implementation
        config.text_config = language_model.config
        config._attn_implementation, config._experts_implementation = attention, experts
        config.dtype = language_model.dtype
        for module in language_model.modules():
            module._is_hf_initialized = True  # or post_init would draw new weights
        model = cls._from_config(config, language_model=language_model)
        if mapper_device is None:
            mapper_device = language_model.get_input_embeddings().weight.device
            if mapper_device.type == "meta":  # offloaded
                mapper_device = language_model.device
        model.mapper.to(mapper_device)
        if (spread := getattr(language_model, "hf_device_map", None)) is not None:
            model.hf_device_map = joint_device_map(spread, model.mapper.queries.device)
        if language_model.generation_config is not None:
            model.generation_config = language_model.generation_config
        return model.eval()  # as from_pretrained: no noise and no dropout before training begins

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        language_model: str | os.PathLike | PreTrainedModel | None = None,
        is_trainable: bool = False,
        **kwargs,
    ) -> Self:
        """Loads a whole checkpoint, or a light one and the language model that it names.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub repo.
            language_model (`str`, `os.PathLike` or `PreTrainedModel`, *optional*):
                For light checkpoints: the language model's folder or Hub repo where it is not the one that the
                checkpoint names, or the language model itself.
            is_trainable (`bool`):
                For light checkpoints: `True` leaves mapper (in float32) and LoRA to train. By default nothing is, as
                with PEFT's adapters. A whole checkpoint always is trainable.
            **kwargs:
                As `PreTrainedModel.from_pretrained`. `dtype`, `device_map`, `quantization_config` and the like act on a
                light checkpoint's language model. Without `dtype` it is in the precision that it had when the
                checkpoint was saved; LoRA always is as stored.

        Raises:
            OSError: the checkpoint, or the language model that it names, is not to be found.
            ValueError: the language model is of another architecture or size than in training, weights are missing or
                left over, or `language_model` was given for a whole checkpoint.
        """
        light = False
        if isinstance(config, PreTrainedConfig):
            light = config.light
        elif pretrained_model_name_or_path is not None and "gguf_file" not in kwargs:
            where = {key: kwargs[key] for key in (*HUB_ARGUMENTS, *OWN_ARGUMENTS) if key in kwargs}
            light = cls.config_class.get_config_dict(config or pretrained_model_name_or_path, **where)[0].get("light")
        if light and pretrained_model_name_or_path is not None:
            name = os.fspath(pretrained_model_name_or_path)
            return cls._from_light(name, config, language_model, is_trainable, **kwargs)
        if language_model is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a whole checkpoint, with a language model of its own; "
                "language_model=... is for light ones."
            )
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @classmethod
    def _from_light(
        cls,
        name: str,
        config: PreTrainedConfig | str | os.PathLike | None,
        language_model: str | os.PathLike | PreTrainedModel | None,
        is_trainable: bool,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        variant: str | None = None,
        generation_config: Any = None,
        output_loading_info: bool = False,
        trust_remote_code: bool | None = None,
        adapter_kwargs: dict | None = None,
        _from_auto: bool = False,
        _from_pipeline: str | None = None,
        **kwargs,
    ) -> Self:
        """`from_pretrained` for a light checkpoint. What is not for the files is for the language model."""
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        where = hub | {key: kwargs.pop(key) for key in OWN_ARGUMENTS if key in kwargs}
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
        else:
            # Here as with whole checkpoints, keywords may also be fields of the configuration.
            config, kwargs = cls.config_class.from_pretrained(
                config or name, return_unused_kwargs=True, **where, **kwargs
            )
        weights = find_weights(name, variant, **where)
        if config.language_model_name_or_path is not None:
            folder = os.path.join(name, where.get("subfolder", ""))
            config.language_model_name_or_path = read_location(config.language_model_name_or_path, folder)

        asked = dtype if dtype is not None else torch_dtype
        asked = None if asked == "auto" else asked
        asked = getattr(torch, asked) if isinstance(asked, str) else asked
        device_map, mapper_device = split_device_map(device_map)
        loading = {**kwargs, **hub, "device_map": device_map, "dtype": asked, "trust_remote_code": trust_remote_code}
        for part in ("attn_implementation", "experts_implementation"):
            loading.setdefault(part, getattr(config, f"_{part}"))  # the configuration takes this keyword for its own
        if not isinstance(language_model, PreTrainedModel):
            loading["dtype"] = asked or config.text_config.dtype or "auto"
        language_model = load_language_model(config, name, language_model, **loading)

        model = cls._around(language_model, config, mapper_device)
        model.requires_grad_(False)
        load_weights(model, weights, name, torch.float32 if is_trainable else asked)
        for parameter_name, parameter in model.named_parameters() if is_trainable else ():
            parameter.requires_grad_(is_light_name(parameter_name))
        defaults = dict.fromkeys((*HUB_ARGUMENTS, "revision"))
        model.adjust_generation_fn(
            generation_config,
            _from_auto,
            _from_pipeline,
            name,
            **{**defaults, "subfolder": "", "trust_remote_code": trust_remote_code, **where},
        )
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *,
        light: bool | None = None,
        **kwargs,
    ) -> None:
        """Writes a whole checkpoint or a light one: mapper, LoRA and the name of the language model.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            state_dict (`dict`, *optional*): as a `Trainer` gives it; of a light checkpoint's, what it needs is taken.
            light (`bool`, *optional*):
                Default: light where the model has LoRA or came from a light checkpoint. A language model in a local
                folder is named as seen from `save_directory`.
            **kwargs: as `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: light, but there is no name of the language model; whole, but LoRA is not merged or the
                language model is quantised.
        """
        light = (self.has_lora or self.config.light) if light is None else light
        name = self.config.language_model_name_or_path
        in_the_file = {"light": light}
        if light:
            self._check_light(kwargs.get("push_to_hub", False))
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {key: tensor for key, tensor in state_dict.items() if is_light_name(key)}
            kwargs["save_original_format"] = False  # names of the language model's own format are of no use here
            self.config.text_config.dtype = self.dtype  # in which it is loaded again
            in_the_file["language_model_name_or_path"] = written_location(name, save_directory)
        elif self.has_lora:
            raise ValueError(
                "A whole checkpoint has no LoRA beside its weights: call merge_lora() first, or save light."
            )
        elif is_quantized(self.language_model):
            raise ValueError(
                "The language model is quantised, and so cannot be part of a whole checkpoint; save light."
            )
        in_memory = {key: getattr(self.config, key) for key in in_the_file}
        try:
            self.config.update(in_the_file)
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        finally:
            self.config.update(in_memory)

    def push_to_hub(self, *args, **kwargs) -> str:
        """`PreTrainedModel.push_to_hub`; light where `save_pretrained` is. A local language model is refused then."""
        if self.has_lora or self.config.light:
            self._check_light(push_to_hub=True)
        return super().push_to_hub(*args, **kwargs)

    def _check_light(self, push_to_hub: bool) -> None:
        name = self.config.language_model_name_or_path
        if name is None:
            raise ValueError(
                "A light checkpoint names its language model, but config.language_model_name_or_path is None; set it "
                "to a folder or a Hub repo whose weights these are."
            )
        if push_to_hub and is_local_location(name):
            raise ValueError(
                f"The language model is {name}, a folder of this machine, which nobody finds from the Hub; set "
                "config.language_model_name_or_path to its Hub repo, or call merge_lora() and save whole."
            )

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False) -> Any:
        # A Trainer that resumes loads a light checkpoint without strictness, and warns of what is missing. That the
        # language model's own weights are is no news.
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if state_dict and all(map(is_light_name, state_dict)):
            result.missing_keys[:] = filter(is_light_name, result.missing_keys)
        return result


def find_weights(checkpoint: str, variant: str | None = None, **where: Any) -> list[str]:
    """Paths of a light checkpoint's weights, one file or several, local or from the Hub.

    Raises:
        OSError: there are none.
    """
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if variant is not None:
        names = [re.sub(r"(?=\.safetensors)", f".{variant}", name) for name in names]
    found = cached_file(checkpoint, names[0], _raise_exceptions_for_missing_entries=False, **where)
    if found is not None:
        return [found]
    index = cached_file(checkpoint, names[1], _raise_exceptions_for_missing_entries=False, **where)
    if index is None:
        raise OSError(f"{checkpoint} has no weights: neither {names[0]} nor {names[1]}.")
    return get_checkpoint_shard_files(checkpoint, index, **where)[0]


def load_weights(model: PreTrainedModel, paths: list[str], checkpoint: str, dtype: torch.dtype | None) -> None:
    """Loads a light checkpoint's own weights into a model. All that it should hold must be there, and nothing else.

    Args:
        model (`PreTrainedModel`): with LoRA where the checkpoint has it.
        paths (list of `str`): from `find_weights`.
        checkpoint (`str`): for the errors.
        dtype (`torch.dtype`, *optional*): of the mapper; default: as stored. LoRA always is as stored.

    Raises:
        ValueError: names, or shapes, that do not match.
    """
    stored = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    expected = {name: tensor for name, tensor in model.state_dict().items() if is_light_name(name)}
    problems = {
        "lacks": expected.keys() - stored.keys(),
        "holds, unexpectedly,": stored.keys() - expected.keys(),
        "holds in another shape": {
            name for name in expected.keys() & stored.keys() if expected[name].shape != stored[name].shape
        },
    }
    if found := [f"{what} {_listed(names)}" for what, names in problems.items() if names]:
        raise ValueError(
            f"The light checkpoint {checkpoint} does not fit its own config.json: it {'; it '.join(found)}."
        )
    tensors = {
        name: tensor.to(expected[name].device, dtype if name.startswith(MAPPER_PREFIX) else None, copy=True)
        for name, tensor in stored.items()
    }
    model.load_state_dict(tensors, strict=False, assign=True)


def _listed(names: set[str], most: int = 8) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


__all__ = ["MatsCheckpointMixin", "is_light_name"]
