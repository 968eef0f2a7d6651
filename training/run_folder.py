"""The folder of a run: its recipe, the Trainer's checkpoints, and how a broken-off run goes on.

OUTPUT_DIR/
    recipe.yaml          the resolved recipe, written before anything else
    data_card.md         what the mixture held
    checkpoints/         the Trainer's
    cache/               rows, embeddings, a new tokenizer
    ...                  at the end the checkpoint itself, with training_record.json
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from training.embedding_cache import write_atomically

RECIPE_FILE = "recipe.yaml"
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
    """Makes the folder of a new run, or checks that the one there is of the same run.

    Raises:
        FileExistsError: there is a run, and it is not to be resumed; or something that is no run.
        ValueError: the run there has another recipe.
    """
    path = folder / RECIPE_FILE
    if path.is_file():
        if not resume:
            raise FileExistsError(f"{folder} holds a run already; go on with --resume, or name another --output_dir.")
        _check_same_run(path, recipe)
    elif folder.is_dir() and any(entry.name != "cache" for entry in folder.iterdir()):
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


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of the Trainer, or `None`. One that a stop left half-written is removed."""
    found = []
    for path in (folder / CHECKPOINTS).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and path.is_dir():
            found.append((int(step), path))
    for _, path in sorted(found, reverse=True):
        if is_whole(path):
            return path
        shutil.rmtree(path)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a Trainer checkpoint was written to its end.

    The Trainer writes `trainer_state.json` last; that it can be read says that the rest was there before. The other
    files are checked all the same: with several ranks the last ones may still be missing.
    """
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


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder beside the run's to write the final checkpoint into; its files are moved over when all are there.

    It lies beside, not within, because a light checkpoint names local folders as seen from its own.
    `training_record.json` comes last: where it is, the run is finished.
    """
    partial = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    entries = sorted(partial.iterdir(), key=lambda path: (path.name == RECORD_FILE, path.name))
    for path in entries:
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    partial.rmdir()


__all__ = ["CHECKPOINTS", "RECIPE_FILE", "RECORD_FILE", "is_whole", "last_checkpoint", "open_run", "written_whole"]
