"""The model card of mats-tiny, written from the runs' own records.

    python -m hub_cards.card runs/mats-tiny/checkpoint/mats-tiny

The folder is a checkpoint with `training_record.json` (training.train_mats), `clap_record.json` and `credits.csv`
(training.train_clap), and `results.json`, `ablation.json` and `gap.json` (evaluation); the card is its `README.md`.
"""

import argparse
import csv
import json
from collections import Counter
from pathlib import Path
from string import Template
from typing import Any

from evaluation.ablation.report import SCORES, below_full_table, methods_table, sweep_table

# Rows of the credits that stand for an instrument of the soundfont, not for a clip.
RENDERED = "rendered/"
TEMPLATE = Path(__file__).with_name("mats_tiny_card.md")


def write_card(checkpoint: Path) -> Path:
    """Fills the template from the records in the checkpoint folder and writes `README.md` there.

    Raises:
        FileNotFoundError: a record is missing.
        KeyError: the template asks for what the records do not hold.
    """
    training, clap, results, ablation, gap = (
        json.loads((checkpoint / name).read_text(encoding="utf-8"))
        for name in ("training_record.json", "clap_record.json", "results.json", "ablation.json", "gap.json")
    )
    with (checkpoint / "credits.csv").open(newline="", encoding="utf-8") as file:
        heard = [row for row in csv.DictReader(file) if not row["file_name"].startswith(RENDERED)]
    licences = Counter(row["licence"] for row in heard)
    parameters = training["parameters"]
    fields = {
        "clap_parameters": _millions(parameters["clap"]),
        "mapper_parameters": _millions(parameters["mapper"]),
        "language_model_parameters": _millions(parameters["language_model"]),
        "audio_parameters": _millions(clap["parameters"]["audio_model"]),
        "clip_count": len(heard),
        "licences": "\n".join(
            f"| {licence.replace('|', ' or ')} | {count} |" for licence, count in licences.most_common()
        ),
        "clap_command": clap["command"],
        "clap_seed": clap["recipe"]["trainer"]["seed"],
        "clap_steps": clap["recipe"]["trainer"]["max_steps"],
        "clap_minutes": round(clap["seconds"] / 60),
        "clap_cosine": f"{clap['result']['group']['cosine']:.3f}",
        "command": training["command"],
        "seed": training["recipe"]["seed"],
        "steps": training["recipe"]["max_steps"],
        "batch": training["recipe"]["per_device_train_batch_size"],
        "minutes": round(training["seconds"] / 60),
        "rows": f"{training['rows']['seen']:,}",
        "memory_size": training["recipe"]["memory_size"],
        "noise_variance": training["noise_variance"],
        "santa": ", ".join(f"{key} {value}" for key, value in training["recipe"]["santa"].items()),
        "torch": training["versions"]["torch"],
        "transformers": training["versions"]["transformers"],
        "esc10": _results_table(results["esc10"]),
        "esc10_clips": results["esc10"]["clips"],
        "packages": _results_table(results["packages"]),
        "packages_clips": results["packages"]["clips"],
        "packages_labels": results["packages"]["labels"],
        "unread": results["packages"]["unread_captions"],
        "package_names": ", ".join(clap["recipe"]["validation_packages"]),
        "examples": f"{results['examples']['named']:.0%} named, {results['examples']['matched']:.0%} matched",
        "ablation_steps": ablation["overrides"].get("max_steps", training["recipe"]["max_steps"]),
        "ablation": methods_table(ablation),
        "below_full": below_full_table(ablation),
        "sweeps": "\n\n".join(sweep_table(sweep) for sweep in ablation["sweeps"]),
        "gap_pairs": gap["settings"]["pairs"],
        "gap": _gap_table(gap),
    }
    card = checkpoint / "README.md"
    card.write_text(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")
    return card


def _results_table(results: dict[str, Any]) -> str:
    """Santa as shipped, its two ends, and CLAP alone, on one set of clips."""
    names = {
        "full": "**Santa as shipped**",
        "without_santa": "without Santa (raw audio embedding)",
        "memory_only": "without the audio embedding (memory only)",
    }
    asked = {score: title for score, title in SCORES.items() if score in results["settings"]["full"]}
    lines = ["| | " + " | ".join(asked.values()) + " |", "|---" * (len(asked) + 1) + "|"]
    for key, title in names.items():
        scores = results["settings"][key]
        lines.append(f"| {title} | " + " | ".join(f"{scores[score]:.3f}" for score in asked) + " |")
    clap, nothing = results["clap"], " - |" * (len(asked) - 1)
    alone = f"{clap['clap_top1']:.3f} (among the nearest five: {clap['clap_top5']:.3f})"
    lines += [f"| CLAP alone, zero-shot | {alone} |{nothing}", f"| chance | {clap['chance']:.3f} |{nothing}"]
    return "\n".join(lines)


def _gap_table(gap: dict[str, Any]) -> str:
    """The four bridges that change one thing at a time."""
    lines = ["| bridge | cosine of pairs | distance of pairs | distance of means | MMD² |", "|---|---|---|---|---|"]
    for name in ("raw", "noise", "memory", "santa"):
        overall = gap["bridges"][name]["overall"]
        figures = [f"{overall[key]:.3f}" for key in ("cosine", "distance", "between_means", "mmd2")]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    print(write_card(parser.parse_args().checkpoint))
