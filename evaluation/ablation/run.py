"""Runs a plan: trains its models, asks each about the held-out clips in every setting, and keeps all scores.

A broken-off ablation goes on where it was: trainings from their last checkpoint, and scores that are there are not
computed again. `results.jsonl` has one line for each setting and seed.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from evaluation.ablation.corrections import CORRECTIONS
from evaluation.ablation.plan import Plan, Setting
from evaluation.ablation.runs import Runs
from evaluation.sound_set import SoundSet, check_unheard
from modeling_mats import MatsForConditionalGeneration
from processing_mats import AudioTextToTextPipeline, ClapEncoder, MatsProcessor
from training.bundled import resolve_clap
from training.clap_data import Clip, Descriptions, read_clips
from training.embed import encode_files
from training.embedding_cache import write_atomically
from training.hard_prompts import NearestLabels, read_labels, with_hard_prompt
from training.recipe import read_yaml_mapping
from training.run_data import check_files

RESULTS_FILE = "results.jsonl"
ZERO_SHOT_FILE = "zero_shot.json"
INPUTS_FILE = "inputs.json"
CALIBRATION_TEXTS = 5000
BATCH_SIZE = 32


@dataclass
class Ablation:
    """One plan on one machine.

    Args:
        plan (`Plan`)
        sounds (`Path`): audiofolder with the held-out clips and, for corrections, others.
        runs (`Runs`): the trainings.
        clap (`ClapEncoder`): the one that all models listen with.
    """

    plan: Plan
    sounds: Path
    runs: Runs
    clap: ClapEncoder

    def __post_init__(self):
        self.output = self.runs.output
        if self.output.exists() and not self.output.is_dir():
            raise FileExistsError(f"output is {self.output}, a file; expected a folder.")
        for setting, seed in self.plan.runs():
            self.runs.recipe(setting, seed)  # tells a mistake in a field before anything is heard or trained
        self.sets = read_sets(self.plan, self.sounds, self.runs.counts)
        if len(self.sets) < 2 and any(setting.correction for setting in self.plan.methods.values()):
            raise ValueError("Corrections are fitted on another set of clips than they are tried on; there is one.")

    def run(self) -> None:
        """Everything that is not there yet."""
        self.output.mkdir(parents=True, exist_ok=True)
        with FileLock(self.output / ".lock", timeout=0):
            self._check_inputs()
            self._run()

    def _check_inputs(self) -> None:
        """Holds an ablation that goes on to what it was begun with; methods and sweeps may be added.

        Raises:
            ValueError: another CLAP, recipe, text or clip than the scores in the folder are of.
        """
        full, seed = self.plan.runs()[0]
        recipe = self.runs.recipe(full, seed)
        inputs = {
            "clap_fingerprint": self.clap.fingerprint,
            "recipe": {name: value for name, value in recipe.resolved().items() if name not in ("mixture", "seed")},
            "texts": check_files(recipe).key(self.runs.data_dir),
            "descriptions": _digest(self.plan.descriptions.read_bytes()),
            "sets": {
                name: {
                    "labels": list(own.labels),
                    "clips": [[c.path.relative_to(self.sounds).as_posix(), c.label, c.caption] for c in own.clips],
                }
                for name, own in self.sets.items()
            },
        }
        inputs = json.loads(json.dumps(inputs))
        path = self.output / INPUTS_FILE
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not earlier and (self.output / RESULTS_FILE).is_file():
            raise ValueError(f"{self.output} holds results of unknown inputs: {INPUTS_FILE} is missing.")
        if earlier and (changed := [name for name in inputs if earlier.get(name) != inputs[name]]):
            raise ValueError(
                f"The ablation in {self.output} was begun with other inputs: {', '.join(changed)}. Go on with its own, "
                "or name another output."
            )
        write_atomically(path, (json.dumps(inputs, indent=1, ensure_ascii=False) + "\n").encode())

    def _run(self) -> None:
        done = {(line["setting"], line["seed"]) for line in mend_lines(self.output / RESULTS_FILE)}
        missing = [(setting, seed) for setting, seed in self.plan.settings() if (setting.key, seed) not in done]
        self.embeds = {name: self._hear(sound_set.clips) for name, sound_set in self.sets.items()}
        zero_shot = {name: s.zero_shot(self.embeds[name], self.clap) for name, s in self.sets.items()}
        (self.output / ZERO_SHOT_FILE).write_text(json.dumps(zero_shot, indent=1) + "\n", encoding="utf-8")
        # What CLAP was trained on besides the rows: the captions of the clips that are not held out.
        held_out = {clip.path for own in self.sets.values() for clip in own.clips}
        captions = [clip.caption for clip in read_clips(self.sounds) if clip.path not in held_out]
        texts = self.runs.rows(Setting(), self.clap).texts()
        self.sets = {name: own.without_read_captions([*texts, *captions]) for name, own in self.sets.items()}
        self.matchers = {name: sound_set.matcher(self.clap) for name, sound_set in self.sets.items()}
        self.nearest_labels = NearestLabels.build(read_labels(self.plan.descriptions), self.clap)
        names = {(setting.run_name, seed) for setting, seed in missing}
        wanted = [(setting, seed) for setting, seed in self.plan.runs() if (setting.run_name, seed) in names]
        for number, (trained, seed) in enumerate(self.runs.train_all(wanted, self.clap), 1):
            own = [s for s, other in missing if other == seed and s.run_name == trained.run_name]
            tell(f"{trained.run_name}, seed {seed}: model {number} of {len(wanted)} is there, {len(own)} settings.")
            self._evaluate(trained, own, seed)

    def _hear(self, clips: Sequence[Clip]) -> torch.Tensor:
        return encode_files([clip.path for clip in clips], self.clap)

    def _evaluate(self, trained: Setting, settings: Sequence[Setting], seed: int) -> None:
        """Asks one trained model in each setting."""
        folder = self.runs.folder(trained, seed)
        processor = MatsProcessor.from_pretrained(folder)
        if processor.clap.fingerprint != self.clap.fingerprint:
            raise ValueError(f"{folder} was trained with another CLAP than the ablation has; remove it.")
        pipe = AudioTextToTextPipeline(model=MatsForConditionalGeneration.from_pretrained(folder), processor=processor)
        memory = processor.santa_memory
        for setting in settings:
            processor.santa_memory = memory
            if setting.memory:
                processor.santa_memory = self.runs.rows(trained, self.clap).memory(setting.memory, seed, processor)
            answers = {name: self._ask(pipe, name, setting) for name in self.sets}
            scores = {name: s.score(answers[name], self.matchers[name]) for name, s in self.sets.items()}
            record = {"run": trained.run_name, "seed": seed, "setting": setting.key, "scores": scores}
            with (self.output / RESULTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "answers": answers}, ensure_ascii=False) + "\n")

    def _ask(self, pipe: AudioTextToTextPipeline, name: str, setting: Setting) -> dict[str, list[str]]:
        """The answers of one model about one set of clips, by question."""
        embeds = self.embeds[name]
        if setting.correction is not None:
            # Neither CLAP nor the model has heard the clips of the other sets, and none of them is asked about here.
            others = torch.cat([own for other, own in self.embeds.items() if other != name])
            texts = self.runs.rows(setting, self.clap).text_sample(CALIBRATION_TEXTS)
            embeds = CORRECTIONS[setting.correction](others, texts)(embeds)
        hints = None
        if "hard_prompts" in setting.train:
            hints = self.nearest_labels.of(embeds, setting.train["hard_prompts"]["count"])
        return ask(pipe, embeds, self.sets[name].questions(), setting.santa, hints)


def read_sets(plan: Plan, sounds: Path, credits: Path | None = None) -> dict[str, SoundSet]:
    """The held-out clips of a plan, by name.

    Raises:
        ValueError: a group or package has no clips, or by its `credits` CLAP was trained on one.
    """
    descriptions = Descriptions.from_yaml(plan.descriptions)
    clips, sets = read_clips(sounds), {}
    for clip_set in plan.clips:
        chosen = [c for c in clips if c.group == clip_set.group or c.package in clip_set.packages]
        wanted = {clip_set.group} if clip_set.group is not None else set(clip_set.packages)
        if missing := sorted(wanted - {c.group for c in chosen} - {c.package for c in chosen}):
            raise ValueError(f"{sounds} has no clips of {', '.join(missing)}, which {clip_set.name} is made of.")
        if credits is not None:
            check_unheard(chosen, sounds, credits)
        sets[clip_set.name] = SoundSet.make(chosen, descriptions, clip_set.labels == "described", clip_set.captions)
    return sets


def ask(
    pipe: AudioTextToTextPipeline,
    embeds: torch.Tensor,
    questions: Sequence[str],
    santa: bool | Mapping | None = None,
    hints: Sequence[Sequence[str]] | None = None,
) -> dict[str, list[str]]:
    """Answers to each question about each sound.

    Args:
        embeds (`torch.Tensor` of shape `(sounds, dim)`): CLAP's, before Santa.
        hints: labels in front of each sound's questions; see [`with_hard_prompt`].
    """
    answers = {}
    for question in questions:
        texts = [with_hard_prompt(question, labels) for labels in hints] if hints is not None else question
        given = pipe([{"audio_embeds": embed} for embed in embeds], text=texts, santa=santa, batch_size=BATCH_SIZE)
        answers[question] = [record["generated_text"] for record in given]
    return answers


def ablate(
    plan: Path,
    sounds: Path,
    data_dir: Path,
    output: Path,
    clap: str | None = None,
    clap_subfolder: str | None = None,
    jobs: int = 1,
) -> Ablation:
    """Runs a plan from the beginning or from where it was; see the module's docstring.

    Args:
        plan (`Path`): YAML, such as `evaluation/recipes/mats_tiny.yaml`.
        sounds (`Path`): audiofolder with a metadata.csv of file_name, label, caption, group, licence, source.
        data_dir (`Path`): folder of the training texts.
        output (`Path`): receives trainings, scores and answers.
        clap, clap_subfolder (`str`, *optional*): what listens; by default as in the training recipe.
        jobs (`int`): trainings side by side.
    """
    loaded = Plan.load(plan)
    fields = read_yaml_mapping(loaded.recipe)
    name = resolve_clap(clap or fields["clap"])
    subfolder = clap_subfolder if clap_subfolder is not None else "" if clap else fields.get("clap_subfolder", "")
    # What a CLAP of these recipes was trained on: in a checkpoint it lies beside `clap/`.
    credits = Path(name) / "credits.csv"
    if not credits.is_file():
        tell(f"{name} has no credits.csv: whether its CLAP was trained on one of the clips is not checked.")
    runs = Runs(loaded, data_dir, name, subfolder, output, credits if credits.is_file() else None, jobs)
    ablation = Ablation(loaded, sounds, runs, ClapEncoder.from_pretrained(name, subfolder=subfolder))
    ablation.run()
    return ablation


def read_lines(path: Path) -> list[dict]:
    """The records of a JSONL file, if there is one; without a last line that a stop left unfinished."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def mend_lines(path: Path) -> list[dict]:
    """As `read_lines`, and takes an unfinished last line off the file, so that it can be written on."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        write_atomically(path, content[: content.rfind(b"\n") + 1])
    return read_lines(path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


__all__ = ["INPUTS_FILE", "RESULTS_FILE", "ZERO_SHOT_FILE", "Ablation", "ablate", "ask", "read_lines", "read_sets"]
