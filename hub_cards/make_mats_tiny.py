"""Makes `hub_cards/mats-tiny` from raw data: trains CLAP, trains on text, measures, writes the card, exports.

    make mats-tiny SOUNDS=path/to/sounds SOUNDFONT=path/to/file.sf2 TEXTS=path/to/texts

SOUNDS is a `datasets` audiofolder whose `metadata.csv` has `file_name, label, caption, group, licence, source`, with
ESC-10's folds as the groups `esc10-fold1` and so on (https://github.com/karolpiczak/ESC-50 holds them); SOUNDFONT is a
General MIDI soundfont (TimGM6mb.sf2 of Debian's timgm6mb-soundfont); TEXTS holds `audiocaps/train.csv`
(https://github.com/cdjkim/audiocaps) and `musiccaps/musiccaps-public.csv`
(https://huggingface.co/datasets/google/MusicCaps). A stage that is finished is not run again, and a broken-off training
goes on from its last checkpoint.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from evaluation.ablation.figures import draw_figures
from evaluation.ablation.report import SUMMARY_FILE, summarise
from evaluation.ablation.run import ablate, ask
from evaluation.gap_report import CLASSES_FIGURE, REPORT_FILE, report_gap
from evaluation.label_folder import encode_clips, judge, read_labels
from evaluation.label_folder import summarise as summarise_judgements
from evaluation.sound_set import SoundSet
from hub_cards.card import write_card
from hub_cards.export import export_checkpoint
from modeling_mats import MatsForConditionalGeneration
from processing_mats import AudioTextToTextPipeline, ClapEncoder, MatsProcessor
from training import train_clap, train_mats
from training.embed import encode_files
from training.recipe import load_recipe
from training.run_folder import RECORD_FILE

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "training" / "recipes"
PLAN = ROOT / "evaluation" / "recipes" / "mats_tiny.yaml"
# Santa as shipped, and the two ends of it.
SETTINGS = {"full": None, "without_santa": False, "memory_only": {"use_audio": False}}


def make(sounds: Path, soundfont: Path, texts: Path, work: Path, output: Path, jobs: int) -> None:
    """All stages, in order; see the module's docstring."""
    clap, mats = work / "clap", work / "mats"
    if not (clap / "training_log.json").exists():
        resume = any((clap / "checkpoints").glob("checkpoint-*"))
        train_clap.train(RECIPES / "mats_tiny_clap.yaml", sounds, clap, soundfont, resume)
    if not (mats / RECORD_FILE).exists():
        places = {"clap": clap, "clap_subfolder": "", "data_dir": texts, "output_dir": mats}
        places["cache_dir"] = work / "ablation" / "cache"  # the ablation's texts are the same
        arguments = [part for name, place in places.items() for part in (f"--{name}", str(place))]
        train_mats.train(load_recipe(RECIPES / "mats_tiny.yaml", [*arguments, "--resume"], clap / "credits.csv"))
    ablation = ablate(PLAN, sounds, texts, work / "ablation", str(clap), jobs=jobs)
    checkpoint = gather(clap, mats, work / "checkpoint" / "mats-tiny")
    draw_figures(summarise(ablation.plan, ablation.output), checkpoint)
    shutil.copyfile(ablation.output / SUMMARY_FILE, checkpoint / SUMMARY_FILE)
    measure(checkpoint, ablation.sets)
    groups = [clips.group for clips in ablation.plan.clips if clips.group is not None]
    packages = [package for clips in ablation.plan.clips for package in clips.packages]
    report_gap(sounds, checkpoint, groups, packages, ablation.plan.descriptions, output=checkpoint)
    for name in (REPORT_FILE, CLASSES_FIGURE):
        (checkpoint / name).unlink(missing_ok=True)  # the card tells the one, and has no room for the other
    write_card(checkpoint)
    export_checkpoint(checkpoint, output, force=True)


def gather(clap: Path, mats: Path, checkpoint: Path) -> Path:
    """The checkpoint with the records of both runs and the licence, without caches and Trainer states.

    Raises:
        ValueError: the checkpoint was trained with another CLAP than the one whose records go along.
    """
    record = json.loads((mats / RECORD_FILE).read_text(encoding="utf-8"))
    if (found := ClapEncoder.from_pretrained(clap).fingerprint) != record["clap_fingerprint"]:
        raise ValueError(
            f"{mats} was trained with the CLAP {record['clap_fingerprint'][:12]}, {clap} holds {found[:12]}; remove "
            f"{mats} to train it anew."
        )
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(mats, checkpoint, ignore=shutil.ignore_patterns("cache", "checkpoints", "inputs.json"))
    shutil.copyfile(clap / "training_log.json", checkpoint / "clap_record.json")
    shutil.copyfile(clap / "credits.csv", checkpoint / "credits.csv")
    shutil.copyfile(ROOT / "LICENSE", checkpoint / "LICENSE")
    return checkpoint


def measure(checkpoint: Path, sets: Mapping[str, SoundSet]) -> dict:
    """Asks about clips that nothing was trained on; writes `results.json` and `judgements.jsonl`."""
    pipe = AudioTextToTextPipeline(
        model=MatsForConditionalGeneration.from_pretrained(checkpoint),
        processor=MatsProcessor.from_pretrained(checkpoint),
    )
    clap = pipe.processor.clap
    results, judgements = {}, []
    for name, sounds_of in sets.items():
        embeds = encode_files([clip.path for clip in sounds_of.clips], clap)
        results[name] = {"clips": len(sounds_of.clips), "labels": len(sounds_of.labels)}
        results[name] |= {"unread_captions": len(sounds_of.unread)}
        results[name] |= {"clap": sounds_of.zero_shot(embeds, clap), "settings": {}}
        matcher = sounds_of.matcher(clap)
        for setting, santa in SETTINGS.items():
            answers = ask(pipe, embeds, sounds_of.questions(), santa)
            results[name]["settings"][setting] = sounds_of.score(answers, matcher)
            if santa is None:  # as shipped: every answer is kept
                for place, clip in enumerate(sounds_of.clips):
                    own = {question: given[place] for question, given in answers.items()}
                    where = "/".join(clip.path.parts[-2:])  # names alone come twice
                    judgements.append({"set": name, "clip": where, "label": clip.label, "answers": own})
    examples = ROOT / "examples" / "sounds"
    labelled = read_labels(examples)
    results["examples"] = summarise_judgements(judge(pipe, labelled, encode_clips(pipe, examples, labelled)))
    (checkpoint / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(judgement, ensure_ascii=False) + "\n" for judgement in judgements)
    (checkpoint / "judgements.jsonl").write_text(lines, encoding="utf-8")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--soundfont", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/mats-tiny"), help="checkpoints and records")
    parser.add_argument("--output", type=Path, default=ROOT / "hub_cards" / "mats-tiny")
    parser.add_argument("--jobs", type=int, default=2, help="trainings of the ablation side by side")
    options = parser.parse_args()
    make(options.sounds, options.soundfont, options.texts, options.work, options.output, options.jobs)
