"""The language model of a light checkpoint: where it is, whether it is the right one, and on which devices."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import resolve_revision

LANGUAGE_MODEL = "language_model"
HUB_REPO = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
# In these a language model must be as it was in training.
SIZES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
# Arguments of from_pretrained that hold for every repo that is read.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


# -- Where the language model (or CLAP) is -----------------------------------------------------------------------------


def is_local_location(name: str) -> bool:
    """Whether a name means a folder and no Hub repo."""
    return os.path.isdir(name) or re.fullmatch(HUB_REPO, name) is None


def read_location(name: str, checkpoint: str) -> str:
    """A name as a checkpoint's file holds it, to one that can be loaded: `../x` counts from a checkpoint's folder."""
    if name.startswith(".") and os.path.isdir(checkpoint):
        return os.path.normpath(os.path.join(os.path.realpath(checkpoint), name))
    return name


def written_location(name: str, folder: str | os.PathLike) -> str:
    """The other way round: a folder is written as seen from the checkpoint's, so that both can be moved together."""
    if not os.path.isdir(name) and not os.path.isabs(name):
        return name
    try:
        relative = Path(os.path.relpath(os.path.realpath(name), os.path.realpath(folder))).as_posix()
    except ValueError:  # on another drive
        return os.path.abspath(name)
    return relative if relative.startswith("../") else f"./{relative}"


def find_commit(name: str, **hub: Any) -> str | None:
    """The commit that a Hub repo is at; `None` for folders, and where the Hub cannot be asked."""
    return getattr(resolve_revision(name, **hub), "resolved", None)


# -- The language model ------------------------------------------------------------------------------------------------


def load_language_model(
    config: PreTrainedConfig,
    checkpoint: str,
    language_model: str | os.PathLike | PreTrainedModel | None,
    **loading: Any,
) -> PreTrainedModel:
    """The language model of a light checkpoint, with as many rows in its embedding table as in training.

    Args:
        config (`MatsConfig`): the checkpoint's; `language_model_name_or_path` is where it can be loaded.
        checkpoint (`str`): for the errors.
        language_model (`str`, `os.PathLike` or `PreTrainedModel`, *optional*): in its place.
        **loading: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        OSError: there is none where it should be.
        ValueError: it is of another architecture or size than in training.
    """
    if isinstance(language_model, PreTrainedModel):
        given = {key for key, value in loading.items() if value is not None and key not in HUB_ARGUMENTS}
        if loading.get("dtype") == "auto":
            given.discard("dtype")
        if given := sorted(given - {"trust_remote_code"}):
            raise ValueError(
                f"language_model is loaded already, so {', '.join(given)} must be said where that is done."
            )
        name = language_model.config._name_or_path or f"the {type(language_model).__name__} given"
        check_language_model(config, language_model.config, checkpoint, name)
    else:
        name = os.fspath(language_model or config.language_model_name_or_path or "")
        if not name:
            raise ValueError(
                f"{checkpoint} is a light checkpoint, but its config.json names no language model; pass "
                "language_model=... to from_pretrained."
            )
        if name == config.language_model_name_or_path and not is_local_location(name):
            loading["revision"] = config.language_model_revision
        language_model = _load_by_name(config, checkpoint, name, loading)
    grow_embeddings(language_model, config.text_config.vocab_size)
    check_language_model(config, language_model.config, checkpoint, name, ("vocab_size",))
    return language_model


def _load_by_name(config: PreTrainedConfig, checkpoint: str, name: str, loading: dict) -> PreTrainedModel:
    try:
        if is_local_location(name) and not os.path.isdir(name):
            raise FileNotFoundError(f"no such folder: {name}")
        hub = {key: loading[key] for key in (*HUB_ARGUMENTS, "revision", "trust_remote_code") if key in loading}
        # Before its weights are fetched, which may take hours.
        check_language_model(config, AutoConfig.from_pretrained(name, **hub), checkpoint, name)
        return AutoModelForCausalLM.from_pretrained(name, **loading)
    except OSError as error:
        raise OSError(
            f"{checkpoint} is a light checkpoint, and its language model, {name}, could not be loaded: {error} Where "
            "it lies elsewhere, say so with language_model=... (--language-model)."
        ) from error


def check_language_model(
    config: PreTrainedConfig,
    found: PreTrainedConfig,
    checkpoint: str,
    name: str,
    fields: tuple[str, ...] = SIZES,
) -> None:
    """Raises `ValueError` where a language model's configuration is not that of the checkpoint's `text_config`."""
    found, expected = found.get_text_config(), config.text_config.get_text_config()  # of multimodal ones, the inner
    differing = [field for field in fields if getattr(found, field, None) != getattr(expected, field, None)]
    if differing:
        described = [
            ", ".join(f"{field} {getattr(one, field, None)}" for field in differing) for one in (found, expected)
        ]
        raise ValueError(
            f"{name} has {described[0]}, but {checkpoint} was trained on a language model of {described[1]}."
        )


def grow_embeddings(language_model: PreTrainedModel, vocab_size: int) -> None:
    """Gives the embedding table and the head `vocab_size` rows where they have fewer: means of the old ones.

    They are never read (the mapper's output takes the placeholder's positions) nor generated.
    """
    rows = language_model.get_input_embeddings().num_embeddings
    if vocab_size <= rows:
        return
    tables = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    if any(table.weight.is_meta for table in tables):
        raise ValueError(
            f"The vocabulary must grow from {rows} to {vocab_size}, but embedding table or head are offloaded; take a "
            "device_map that keeps them."
        )
    if not tables[1].weight.is_floating_point():
        raise ValueError(
            f"The vocabulary must grow from {rows} to {vocab_size}, but the head is quantised; leave it out "
            '(llm_int8_skip_modules=["lm_head"]).'
        )
    language_model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for table in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        table.weight.data[rows:] = table.weight.data[:rows].mean(0)


def split_device_map(device_map: Any) -> tuple[Any, Any]:
    """A map over MATS to one over its language model, and the mapper's device (`None`: that of the first layer)."""
    if not isinstance(device_map, Mapping):
        return device_map, None
    of_language_model, mapper = {}, None
    for key, device in device_map.items():
        if key in ("", LANGUAGE_MODEL):
            of_language_model[""] = device
        elif key.startswith(f"{LANGUAGE_MODEL}."):
            of_language_model[key.removeprefix(f"{LANGUAGE_MODEL}.")] = device
        elif key == "mapper":
            mapper = device
        elif key != "noise":  # without weights
            raise ValueError(f"device_map names {key!r}, expected 'mapper' or names that begin with 'language_model'.")
    return of_language_model, mapper


def joint_device_map(of_language_model: Mapping, mapper: torch.device) -> dict:
    """The way back: `hf_device_map`, by which a `Trainer` knows that a model is spread over several devices."""
    joint = {f"{LANGUAGE_MODEL}.{key}".rstrip("."): device for key, device in of_language_model.items()}
    return {"mapper": mapper.type if mapper.index is None else mapper.index, **joint}


__all__ = [
    "HUB_ARGUMENTS",
    "find_commit",
    "grow_embeddings",
    "is_local_location",
    "joint_device_map",
    "load_language_model",
    "read_location",
    "split_device_map",
    "written_location",
]
