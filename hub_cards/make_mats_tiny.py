"""Makes `hub_cards/mats-tiny` from raw data: trains CLAP, trains on text, measures, writes the card, exports.

    make mats-tiny SOUNDS=path/to/sounds TEXTS=path/to/texts

SOUNDS is a `datasets` audiofolder whose `metadata.csv` has `file_name, label, caption, group, licence, source`, with
ESC-10's folds as the groups `esc10-fold1` and so on (https://github.com/karolpiczak/ESC-50 holds them); TEXTS holds
`audiocaps/train.csv` (https://github.com/cdjkim/audiocaps) and `musiccaps/musiccaps-public.csv`
(https://huggingface.co/datasets/google/MusicCaps). A stage that is finished is not run again, and a broken-off training
goes on from its last checkpoint.
"""

import argparse
import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from evaluation.label_folder import encode_clips, judge, read_labels, summarise
from hub_cards.card import write_card
from hub_cards.export import export_checkpoint
from modeling_mats import MatsForConditionalGeneration
from processing_mats import AudioTextToTextPipeline, MatsProcessor
from training import train_clap, train_mats
from training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "training" / "recipes"
VALIDATION_GROUP = "esc10-fold4"
# Santa as shipped, and the two ends of it.
SETTINGS = {"": None, "_without_santa": False, "_memory_only": {"use_audio": False}}


def make(sounds: Path, texts: Path, work: Path, output: Path) -> None:
    """All stages, in order; see the module's docstring."""
    clap, mats = work / "clap", work / "mats"
    if not (clap / "training_log.json").exists():
        resume = any((clap / "checkpoints").glob("checkpoint-*"))
        train_clap.train(RECIPES / "mats_tiny_clap.yaml", sounds, clap, resume)
    if not (mats / "training_record.json").exists():
        train_mats.train(recipe_of(clap, texts, mats))
    checkpoint = gather(clap, mats, work / "checkpoint")
    measure(checkpoint, sounds)
    write_card(checkpoint)
    export_checkpoint(checkpoint, output, force=True)


def recipe_of(clap: Path, texts: Path, mats: Path) -> Recipe:
    """The recipe of the language side, around the CLAP that was just trained rather than the bundled one."""
    arguments = ["--clap", str(clap), "--clap_subfolder", "", "--data_dir", str(texts), "--output_dir", str(mats)]
    recipe = load_recipe(RECIPES / "mats_tiny.yaml", [*arguments, "--resume"])
    # Labels are drawn by how often this CLAP has heard them. A path of this machine is no part of the record.
    recipe.data.mixture = copy.deepcopy(recipe.data.mixture)
    recipe.data.mixture["sources"][0]["counts"] = str((clap / "credits.csv").resolve())
    return recipe


def gather(clap: Path, mats: Path, checkpoint: Path) -> Path:
    """The checkpoint with the records of both runs and the licence, without caches and Trainer states."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(mats, checkpoint, ignore=shutil.ignore_patterns("cache", "checkpoints", "inputs.json"))
    shutil.copyfile(clap / "training_log.json", checkpoint / "clap_record.json")
    shutil.copyfile(clap / "credits.csv", checkpoint / "credits.csv")
    shutil.copyfile(ROOT / "LICENSE", checkpoint / "LICENSE")
    return checkpoint


def measure(checkpoint: Path, sounds: Path) -> dict:
    """Asks about clips that nothing was trained on; writes `results.json` and `judgements.jsonl`."""
    pipe = AudioTextToTextPipeline(
        model=MatsForConditionalGeneration.from_pretrained(checkpoint),
        processor=MatsProcessor.from_pretrained(checkpoint),
    )
    results, judgements = {}, []
    clips = read_labels(sounds, VALIDATION_GROUP)
    embeds = encode_clips(pipe, sounds, clips)
    for suffix, santa in SETTINGS.items():
        judged = judge(pipe, clips, embeds, santa)
        results[f"esc10_fold4{suffix}"] = summarise(judged)
        judgements += [{"setting": f"esc10_fold4{suffix}", **asdict(judgement)} for judgement in judged]
    examples = ROOT / "examples" / "sounds"
    clips = read_labels(examples)
    results["examples"] = summarise(judge(pipe, clips, encode_clips(pipe, examples, clips)))
    (checkpoint / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(judgement) + "\n" for judgement in judgements)
    (checkpoint / "judgements.jsonl").write_text(lines, encoding="utf-8")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/mats-tiny"), help="checkpoints and records")
    parser.add_argument("--output", type=Path, default=ROOT / "hub_cards" / "mats-tiny")
    options = parser.parse_args()
    make(options.sounds, options.texts, options.work, options.output)
