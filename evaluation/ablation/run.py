"""Runs a plan: trains its models, asks each about the held-out clips in every setting, and keeps all scores.

A broken-off ablation goes on where it was: trainings from their last checkpoint, and scores that are there are not
computed again. `results.jsonl` has one line for each setting and seed.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.ablation.bridges import BRIDGES
from evaluation.ablation.plan import Plan, Setting
from evaluation.ablation.runs import LABELS_FILE, Rows, Runs
from evaluation.sound_set import SoundSet, check_unheard
from modeling_mats import MatsForConditionalGeneration
from processing_mats import AudioTextToTextPipeline, ClapEncoder, MatsProcessor
from training.bundled import resolve_clap
from training.clap_data import Clip, Descriptions, read_clips
from training.embed import encode_files
from training.hard_prompts import NearestLabels, with_hard_prompt
from training.recipe import read_yaml_mapping

RESULTS_FILE = "results.jsonl"
ANSWERS_FILE = "answers.jsonl"
ZERO_SHOT_FILE = "zero_shot.json"
CALIBRATION_TEXTS = 5000
BATCH_SIZE = 32


@dataclass
class Ablation:
    """One plan on one machine.

    Args:
        plan (`Plan`)
        sounds (`Path`): audiofolder with the held-out clips and, for bridges, others.
        runs (`Runs`): the trainings.
        clap (`ClapEncoder`): the one that all models listen with.
    """

    plan: Plan
    sounds: Path
    runs: Runs
    clap: ClapEncoder

    def __post_init__(self):
        self.output = self.runs.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.descriptions = Descriptions.from_yaml(self.plan.descriptions)
        (self.output / LABELS_FILE).write_text("\n".join(self.descriptions.concepts) + "\n", encoding="utf-8")
        self.sets = read_sets(self.plan, self.sounds, self.runs.counts)
        held_out = {clip.path for sound_set in self.sets.values() for clip in sound_set.clips}
        self.calibration = [clip for clip in read_clips(self.sounds) if clip.path not in held_out]

    def run(self) -> None:
        """Everything that is not there yet."""
        done = {(line["setting"], line["seed"]) for line in read_lines(self.output / RESULTS_FILE)}
        missing = [(setting, seed) for setting, seed in self.plan.settings() if (setting.key, seed) not in done]
        self.embeds = {name: self._hear(sound_set.clips) for name, sound_set in self.sets.items()}
        if any(setting.bridge for setting, _ in missing):
            self.embeds["calibration"] = self._hear(self.calibration)
        zero_shot = {name: s.zero_shot(self.embeds[name], self.clap) for name, s in self.sets.items()}
        (self.output / ZERO_SHOT_FILE).write_text(json.dumps(zero_shot, indent=1) + "\n", encoding="utf-8")
        self.matchers = {name: sound_set.matcher(self.clap) for name, sound_set in self.sets.items()}
        self.nearest_labels = NearestLabels.build(self.descriptions.concepts, self.clap)
        names = {(setting.run_name, seed) for setting, seed in missing}
        wanted = [(setting, seed) for setting, seed in self.plan.runs() if (setting.run_name, seed) in names]
        for number, (trained, seed) in enumerate(self.runs.train_all(wanted), 1):
            own = [s for s, other in missing if other == seed and s.run_name == trained.run_name]
            tell(f"{trained.run_name}, seed {seed}: model {number} of {len(wanted)} is there, {len(own)} settings.")
            self._evaluate(trained, own, seed)

    def _hear(self, clips: Sequence[Clip]) -> torch.Tensor:
        return encode_files([clip.path for clip in clips], self.clap)

    def _evaluate(self, trained: Setting, settings: Sequence[Setting], seed: int) -> None:
        """Asks one trained model in each setting."""
        folder = self.runs.folder(trained, seed)
        processor = MatsProcessor.from_pretrained(folder)
        processor.clap = self.clap
        model = MatsForConditionalGeneration.from_pretrained(folder)
        pipe = AudioTextToTextPipeline(model=model, processor=processor)
        rows = None
        if any(setting.memory or setting.bridge for setting in settings):
            rows = self.runs.embed(trained, seed)
        memory = processor.santa_memory
        for setting in settings:
            processor.santa_memory = rows.memory(setting.memory, seed, processor) if setting.memory else memory
            answers = {name: self._ask(pipe, name, setting, rows) for name in self.sets}
            scores = {name: s.score(answers[name], self.matchers[name]) for name, s in self.sets.items()}
            record = {"run": trained.run_name, "seed": seed, "setting": setting.key}
            append_line(self.output / ANSWERS_FILE, {**record, "answers": answers})
            append_line(self.output / RESULTS_FILE, {**record, "scores": scores})

    def _ask(self, pipe: AudioTextToTextPipeline, name: str, setting: Setting, rows: Rows) -> dict[str, list[str]]:
        """The answers of one model about one set of clips, by question."""
        embeds = self.embeds[name]
        if setting.bridge is not None:
            embeds = BRIDGES[setting.bridge](self.embeds["calibration"], rows.text_sample(CALIBRATION_TEXTS))(embeds)
        hints = None
        if "hard_prompts" in setting.train:
            hints = self.nearest_labels.of(embeds, setting.train["hard_prompts"]["count"])
        return ask(pipe, embeds, self.sets[name].questions(), setting.santa, hints)


def read_sets(plan: Plan, sounds: Path, credits: Path | None = None) -> dict[str, SoundSet]:
    """The held-out clips of a plan, by name.

    Raises:
        ValueError: a set has no clips, or by its `credits` CLAP was trained on one.
    """
    descriptions = Descriptions.from_yaml(plan.descriptions)
    clips, sets = read_clips(sounds), {}
    for clip_set in plan.clips:
        chosen = [c for c in clips if c.group == clip_set.group or c.package in clip_set.packages]
        if not chosen:
            wanted = clip_set.group or ", ".join(clip_set.packages)
            raise ValueError(f"{sounds} has no clips for {clip_set.name}: {wanted}.")
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
    runs = Runs(loaded, data_dir, name, subfolder, output, credits if credits.is_file() else None, jobs)
    ablation = Ablation(loaded, sounds, runs, ClapEncoder.from_pretrained(name, subfolder=subfolder))
    ablation.run()
    return ablation


def read_lines(path: Path) -> list[dict]:
    """The records of a JSONL file; a last line that a stop left unfinished is taken off the file."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines[:-1]))
        lines.pop()
    return [json.loads(line) for line in lines]


def append_line(path: Path, record: Mapping) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


__all__ = ["ANSWERS_FILE", "RESULTS_FILE", "ZERO_SHOT_FILE", "Ablation", "ablate", "ask", "read_lines", "read_sets"]
