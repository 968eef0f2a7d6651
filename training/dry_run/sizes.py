"""What a recipe names, as far as it is on this machine: CLAP, the language model and the device."""

import re

import psutil
import torch
from transformers import AutoConfig, PreTrainedConfig

from configuration_mats import MatsConfig, MsClapConfig
from training.bundled import resolve_clap
from training.dry_run.report import Device
from training.recipe import DataArguments, ModelArguments, RunArguments


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
