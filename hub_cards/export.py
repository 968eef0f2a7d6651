"""A checkpoint folder to a Hub repo that needs nothing of ours installed.

    mats export path/to/checkpoint path/to/repo

The export holds the checkpoint's data files, the code as flat remote code, the configuration entries by which
transformers finds that code, and `requirements.txt`. Exporting an export gives the same bytes, also after transformers
has loaded it as remote code and saved it again.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from hub_cards.remote_code import ENTRY_MODULES, find_packages, flatten_modules, requirements_of

MODEL_TYPE = "mats"
CONFIG, PROCESSOR_CONFIG, REQUIREMENTS = "config.json", "processor_config.json", "requirements.txt"
TOKENIZER_CONFIGS = ("tokenizer_config.json", "clap/tokenizer_config.json")
MEMORY = "santa_memory.safetensors"
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_mats.MatsConfig",
    "AutoModel": "modeling_mats.MatsForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_mats.MatsForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mats.MatsForConditionalGeneration",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_mats.MatsProcessor"}
CUSTOM_PIPELINES = {
    "audio-text-to-text": {
        "impl": "pipeline_mats.AudioTextToTextPipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    }
}
NEEDED = {PROCESSOR_CONFIG: "save the MatsProcessor into the same folder"}
CLAP_CONFIG = "clap/config.json"
# A loaded tokenizer, saved again, notes how it was loaded; that says nothing of the published one.
LOADING_NOTES = ("auto_map", "is_local", "local_files_only")
# What a Trainer and version control leave in a folder; none of it is part of the model.
IGNORED = (
    ".*",
    "__pycache__",
    "cache",
    "checkpoints",
    "checkpoint-*",
    "inputs.json",
    "runs",
    "trainer_state.json",
    "training_args.bin",
)
IGNORED += ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth")
# Reading these can run code.
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def export_checkpoint(source_dir: str | os.PathLike, output_dir: str | os.PathLike, force: bool = False) -> Path:
    """Writes a checkpoint as a flat, self-contained Hub repo.

    Args:
        source_dir (`str` or `os.PathLike`):
            Folder of a checkpoint, whole or light: model, processor and CLAP, and where there are any, memory, card,
            licence. What a light one leaves to others must be on the Hub.
        output_dir (`str` or `os.PathLike`):
            Folder to write; it appears whole or not at all. It may be `source_dir` itself, with `force`.
        force (`bool`, *optional*, defaults to `False`):
            Replace `output_dir` if it holds a MATS checkpoint. Any other folder with content is never touched.

    Returns:
        `Path`: `output_dir`.

    Raises:
        FileNotFoundError: the checkpoint, or a part of it, is missing.
        FileExistsError: `output_dir` must not be replaced.
        ValueError: `source_dir` is no MATS checkpoint, holds pickles or foreign code, or names a language model or CLAP
            that is on this machine only.
    """
    source, output = Path(source_dir).resolve(), Path(output_dir).resolve()
    config = _read_config(source)
    files = {path.relative_to(source).as_posix() for path in _files(source)}
    code = flatten_modules(ENTRY_MODULES, find_packages())
    _check_files(source, files, code)
    processor_config = _read_json(source / PROCESSOR_CONFIG)
    _check_can_be_found(source, config, processor_config, CLAP_CONFIG in files)
    _check_replaceable(source, output, force)

    origin = config.get("language_model_name_or_path")
    if origin is not None and not config.get("light") and _is_local(origin, source):
        config |= {"language_model_name_or_path": None}  # where it lay on this machine is of no use elsewhere
    optional = ("peft",) if config.get("lora") is not None else ()
    texts = code | {
        CONFIG: _to_json(config | {"auto_map": MODEL_AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}),
        PROCESSOR_CONFIG: _to_json(processor_config | {"auto_map": PROCESSOR_AUTO_MAP}),
        REQUIREMENTS: "".join(f"{line}\n" for line in requirements_of(code, optional)),
    }
    for name in files.intersection(TOKENIZER_CONFIGS):
        tokenizer_config = _read_json(source / name)
        texts[name] = _to_json({key: value for key, value in tokenizer_config.items() if key not in LOADING_NOTES})
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        for name in sorted(files - texts.keys()):
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)  # contents only: in the Hub's cache the source is a link
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        _replace_folder(output, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _read_config(source: Path) -> dict:
    path = source / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{source} is no checkpoint: it has no {CONFIG}.")
    config = _read_json(path)
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{path} is of model type {config.get('model_type')!r}, expected {MODEL_TYPE!r}.")
    return config


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def _to_json(content: dict) -> str:
    # Laid out as transformers does it.
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _files(folder: Path) -> Iterator[Path]:
    """All files of a checkpoint, without what training left behind."""
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in IGNORED):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _check_files(source: Path, files: set[str], code: Iterable[str]) -> None:
    """A checkpoint must be complete, and free of pickles and of code that is not this package's own."""
    for name, advice in NEEDED.items():
        if name not in files:
            raise FileNotFoundError(f"{source} has no {name}: {advice}.")
    if not any(name.endswith(".safetensors") and "/" not in name and name != MEMORY for name in files):
        raise FileNotFoundError(f"{source} has no weights (*.safetensors): save the model into the same folder.")
    if pickles := sorted(name for name in files if Path(name).suffix in PICKLES):
        raise ValueError(f"{source} holds pickles, {', '.join(pickles)}; only safetensors and JSON are published.")
    if foreign := sorted(name for name in files.difference(code) if name.endswith(".py")):
        raise ValueError(f"{source} holds code that is not MATS's, {', '.join(foreign)}; remove it to export.")


def _check_can_be_found(source: Path, config: dict, processor_config: dict, has_clap: bool) -> None:
    """What a light checkpoint takes from elsewhere must be on the Hub."""
    named = {
        "language model": (config.get("language_model_name_or_path") if config.get("light") else None, CONFIG),
        "CLAP": (None if has_clap else processor_config.get("clap_name_or_path"), PROCESSOR_CONFIG),
    }
    if not has_clap and named["CLAP"][0] is None:
        raise FileNotFoundError(
            f"{source} has no {CLAP_CONFIG}: the processor was saved without CLAP or a name of it, so it cannot hear."
        )
    for what, (name, file) in named.items():
        if name is not None and _is_local(name, source):
            raise ValueError(
                f"{source} names {name} as its {what}, a folder of this machine, which nobody finds from the Hub; name "
                f"a Hub repo in its {file}, or make the checkpoint whole (mats merge)."
            )


def _is_local(name: str, source: Path) -> bool:
    from modeling_mats.language_model_mats import is_local_location  # torch comes along, which most exports need not

    return is_local_location(name) or (source / name).exists()


def _check_replaceable(source: Path, output: Path, force: bool) -> None:
    if output != source and (output.is_relative_to(source) or source.is_relative_to(output)):
        raise ValueError(f"{source} and {output} must not lie in each other.")
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"{output} is a file, expected a folder to write.")
    if not any(output.iterdir()):
        return
    try:
        _read_config(output)
    except (OSError, ValueError) as error:
        raise FileExistsError(f"{output} is not empty and no MATS checkpoint, so it is left alone: {error}") from error
    if not force:
        raise FileExistsError(f"{output} holds a checkpoint already; force=True (--force) replaces it.")
    if (output / ".git").exists():
        raise FileExistsError(f"{output} is a git repository, and replacing it would lose its history.")


def _replace_folder(output: Path, new: Path) -> None:
    """Puts a folder in another's place; if that fails, the old one is put back."""
    if not output.exists():
        new.rename(output)
        return
    old = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    output.rename(old)
    try:
        new.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old)


__all__ = ["export_checkpoint"]
