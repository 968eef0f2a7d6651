"""The folder of a run: its recipe, the Trainer's checkpoints, and how a broken-off run goes on.

OUTPUT_DIR/
    recipe.yaml          the resolved recipe, written before anything else
    data_card.md         what the mixture held
    checkpoints/         the Trainer's
    cache/               rows, embeddings, a new tokenizer
    ...                  at the end the checkpoint itself, with training_record.json
"""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from training.embedding_cache import write_atomically

RECIPE_FILE = "recipe.yaml"
INPUTS_FILE = "inputs.json"
RECORD_FILE = "training_record.json"
CHECKPOINTS = "checkpoints"
# What may change when a run goes on: it decides how the run is watched and stored, not what comes out.
FREE_TO_CHANGE = {
    "checkpoint",
    "checkpoint_dtype",
    "dataloader_num_workers",
    "disable_tqdm",
    "eval_steps",
    "eval_strategy",
    "generation",
    "logging_steps",
    "logging_strategy",
    "memory_clusters",
    "memory_dtype",
    "memory_noise_variance",
    "memory_shares",
    "memory_size",
    "report_to",
    "santa",
    "save_steps",
    "save_total_limit",
}


def open_run(folder: Path, recipe: Mapping[str, Any], resume: bool) -> None:
    """Makes the folder of a new run, or checks that the one there is of the same run. A run that never came to a
    checkpoint, as one with a mistake in its recipe, is begun anew.

    Raises:
        FileExistsError: there is a run, and it is not to be resumed; or something that is no run.
        ValueError: the run there has another recipe.
    """
    path = folder / RECIPE_FILE
    begun = any((folder / CHECKPOINTS).glob("checkpoint-*")) or (folder / RECORD_FILE).is_file()
    if path.is_file() and not begun:
        (folder / INPUTS_FILE).unlink(missing_ok=True)  # it never came to a checkpoint: there is nothing to lose
    elif path.is_file():
        if not resume:
            raise FileExistsError(f"{folder} holds a run already; go on with --resume, or name another --output_dir.")
        _check_same_run(path, recipe)
    elif folder.is_dir() and any(entry.name != "cache" and entry.name[0] != "." for entry in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no run of `mats train`; name another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).encode())


def _check_same_run(path: Path, recipe: Mapping[str, Any]) -> None:
    earlier = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    now = yaml.safe_load(yaml.safe_dump(dict(recipe)))
    changed = [
        f"{name} was {earlier.get(name)!r:.60} and is {now.get(name)!r:.60}"
        for name in sorted({*earlier, *now} - FREE_TO_CHANGE)
        if earlier.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"The run in {path.parent} has another recipe: {'; '.join(changed)}. Resume it with its own, or "
            "start a new run in another --output_dir."
        )


def check_inputs(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Holds what a run is fed with to what it was begun with, which is written at its first start.

    Args:
        folder (`Path`): of the run.
        inputs (mapping): fingerprints and sizes, as JSON; a value of `None` is taken from the first start.

    Returns:
        `dict`: the inputs of the first start.

    Raises:
        ValueError: something has changed since; going on would end in neither run's weights.
    """
    path = folder / INPUTS_FILE
    if not path.is_file():
        write_atomically(path, json.dumps(dict(inputs), indent=1).encode())
        return dict(inputs)
    first = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} was {first.get(name)!r:.60} and is {value!r:.60}"
        for name, value in inputs.items()
        if value is not None and first.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"The run in {folder} was begun with something else: {'; '.join(changed)}. Resume it with what it had, or "
            "start a new run in another --output_dir."
        )
    return first


def last_checkpoint(folder: Path, ranks: int = 1) -> Path | None:
    """The newest whole checkpoint of the Trainer, or `None`. One that a stop left half-written is removed."""
    found = []
    for path in (folder / CHECKPOINTS).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and path.is_dir():
            found.append((int(step), path))
    for _, path in sorted(found, reverse=True):
        if is_whole(path, ranks):
            return path
        shutil.rmtree(path)
    return None


def is_whole(checkpoint: Path, ranks: int = 1) -> bool:
    """Whether a Trainer checkpoint was written to its end.

    The Trainer writes `trainer_state.json` last; that it can be read says that the rest was there before. The other
    files are checked all the same: other ranks may not have written theirs by then.
    """
    states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    if not all((checkpoint / name).is_file() for name in states):
        return False
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] != int(checkpoint.name.removeprefix("checkpoint-")):
            return False
        for path in checkpoint.rglob("*"):
            if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return False
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # reads the header, and holds it against the file's size
                    pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return True


def clear_result(folder: Path) -> None:
    """Removes an earlier end of the run, the record first: where that is, the checkpoint beside it is whole."""
    (folder / RECORD_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / "clap", ignore_errors=True)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        path.unlink()


__all__ = [
    "CHECKPOINTS",
    "INPUTS_FILE",
    "RECIPE_FILE",
    "RECORD_FILE",
    "check_inputs",
    "clear_result",
    "is_whole",
    "last_checkpoint",
    "open_run",
]
