"""The models of an ablation: each trained by `training.train_mats` in a process of its own, several side by side."""

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from evaluation.ablation.plan import Plan, Setting
from processing_mats import ClapEncoder, MatsProcessor
from processing_mats.santa_mats import SantaMemory
from training.embedding_cache import Ranks
from training.memory import make_memory
from training.recipe import Recipe, load_recipe
from training.run_data import RunData, check_files, embed_rows, leave_out_unusable_rows, read_rows
from training.run_folder import RECORD_FILE
from training.train_mats import train


class TrainingFailed(ChildProcessError):
    """A training of the ablation ended with an error; its log is named."""


@dataclass
class Runs:
    """Trains what a plan asks for, under `output/runs`, with one cache for all.

    Args:
        plan (`Plan`)
        data_dir (`Path`): folder of the training texts.
        clap (`str`), clap_subfolder (`str`): what listens, as in a recipe.
        output (`Path`)
        counts (`Path`, *optional*): the CLAP's own `credits.csv`, for mixtures that draw labels by it.
        jobs (`int`): trainings side by side; the machine's threads are dealt out among them.
    """

    plan: Plan
    data_dir: Path
    clap: str
    clap_subfolder: str
    output: Path
    counts: Path | None = None
    jobs: int = 1

    def __post_init__(self):
        self.children = []
        self.stopping = False
        self.lock = Lock()
        self._rows: dict[str, Rows] = {}

    def folder(self, setting: Setting, seed: int) -> Path:
        return self.output / "runs" / f"{setting.run_name}-seed{seed}"

    def arguments(self, setting: Setting, seed: int) -> list[str]:
        """The command line of one training, after the recipe's path."""
        fields = {
            **self.plan.overrides,
            **setting.train,
            "seed": seed,
            "data_dir": self.data_dir,
            "clap": self.clap,
            "cache_dir": self.output / "cache",
            "output_dir": self.folder(setting, seed),
        }
        arguments = ["--clap_subfolder", self.clap_subfolder, "--resume"]
        if "hard_prompts" in fields:
            fields["hard_prompts"] = {"labels": str(self.plan.descriptions.resolve()), **fields["hard_prompts"]}
        for name, value in fields.items():
            if isinstance(value, list):
                arguments += [f"--{name}", *map(str, value)]
            else:
                arguments += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return arguments

    def recipe(self, setting: Setting, seed: int) -> Recipe:
        return load_recipe(self.plan.recipe, self.arguments(setting, seed), self.counts)

    def train_all(self, wanted: Sequence[tuple[Setting, int]], clap: ClapEncoder) -> Iterator[tuple[Setting, int]]:
        """Trains what is not trained yet, and yields each model when it is there, in the order of the plan.

        Raises:
            TrainingFailed: one of them ended with an error. What is running besides is ended too, and goes on from its
                last checkpoint at the next start.
        """
        todo = [run for run in wanted if not (self.folder(*run) / RECORD_FILE).is_file()]
        if todo:
            self.rows(todo[0][0], clap)  # embeds once what several would embed at the same time
        executor = ThreadPoolExecutor(self.jobs)
        futures = [executor.submit(self._train, *run) for run in wanted]
        try:
            for run, future in zip(wanted, futures, strict=True):
                future.result()
                yield run
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            with self.lock:
                self.stopping = True
                for child in self.children:
                    child.terminate()

    def _train(self, setting: Setting, seed: int) -> None:
        folder = self.folder(setting, seed)
        if (folder / RECORD_FILE).is_file():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(folder.name + ".log")
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        arguments = (self.plan.recipe, self.arguments(setting, seed), self.counts, log, threads)
        child = get_context("spawn").Process(target=_train_in_child, args=arguments)
        with self.lock:
            if self.stopping:
                return
            child.start()
            self.children.append(child)
        child.join()
        if child.exitcode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise TrainingFailed(f"{folder.name} ended with {child.exitcode}, see {log}: {''.join(last)}")

    def rows(self, setting: Setting, clap: ClapEncoder) -> "Rows":
        """The embedded rows of a training, which are the same for every seed; what is cached is not encoded again."""
        if setting.run_name not in self._rows:
            recipe = self.recipe(Setting(train=setting.train), self.plan.seeds[0])
            cache_dir = Path(recipe.data.cache_dir)
            cache_dir.mkdir(parents=True, exist_ok=True)
            recipe.run.output_dir = str(cache_dir)  # of the data's card: the run's own folder is for the run to make
            data = read_rows(recipe, check_files(recipe), cache_dir, Ranks())
            embed_rows(recipe, data, clap, cache_dir, Ranks())
            self._rows[setting.run_name] = Rows(recipe, data, clap.fingerprint)
        return self._rows[setting.run_name]


@dataclass
class Rows:
    """The rows of a training with their embeddings, to draw other memories from."""

    recipe: Recipe
    data: RunData
    clap_fingerprint: str

    def __post_init__(self):
        self._checked = False

    def memory(self, overrides: Mapping[str, Any], seed: int, processor: MatsProcessor) -> SantaMemory:
        """The memory that the training would have made with other `memory_*` fields."""
        recipe = self.recipe
        if not self._checked:
            leave_out_unusable_rows(self.data, processor, recipe)
            self._checked = True
        return make_memory(
            replace(recipe.memory, **overrides),
            self.data.examples,
            self.data.train,
            self.data.cache,
            self.data.cache_rows,
            self.clap_fingerprint,
            float(recipe.model.noise_variance),
            recipe.model.renormalize,
            seed,
        )

    def texts(self) -> list[str]:
        """Every different description and answer, held-out ones included."""
        examples = self.data.examples
        return [*examples.unique("description"), *examples.unique("answer")]

    def text_sample(self, count: int) -> torch.Tensor:
        """Embeddings `(count, dim)` of different training texts."""
        rows = np.unique(self.data.cache_rows[self.data.train])
        chosen = np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False)
        return torch.from_numpy(self.data.cache.embeddings(np.sort(chosen)))


def _end_with_parent() -> None:
    """A training must not outlive the ablation, whose next start would begin a second one in the same folder."""
    wait([parent_process().sentinel])
    os._exit(1)


def _train_in_child(path: Path, arguments: Sequence[str], counts: Path | None, log: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        train(load_recipe(path, arguments, counts))


__all__ = ["Rows", "Runs", "TrainingFailed"]
