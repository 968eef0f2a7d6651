"""The model card of mats-tiny, written from the runs' own records.

    python -m hub_cards.card runs/mats-tiny/checkpoint

The folder is a checkpoint with `training_record.json` (training.train_mats), `clap_record.json` and `credits.csv`
(training.train_clap) and `results.json` (evaluation); the card is its `README.md`.
"""

import argparse
import csv
import json
from collections import Counter
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_name("mats_tiny_card.md")


def write_card(checkpoint: Path) -> Path:
    """Fills the template from the records in the checkpoint folder and writes `README.md` there.

    Raises:
        FileNotFoundError: a record is missing.
        KeyError: the template asks for what the records do not hold.
    """
    training, clap, results = (
        json.loads((checkpoint / name).read_text(encoding="utf-8"))
        for name in ("training_record.json", "clap_record.json", "results.json")
    )
    with (checkpoint / "credits.csv").open(newline="", encoding="utf-8") as file:
        licences = Counter(row["licence"] for row in csv.DictReader(file))
    parameters = training["parameters"]
    fields = {
        "clap_parameters": _millions(parameters["clap"]),
        "mapper_parameters": _millions(parameters["mapper"]),
        "language_model_parameters": _millions(parameters["language_model"]),
        "audio_parameters": _millions(clap["parameters"]["audio_model"]),
        "clip_count": sum(licences.values()),
        "licences": "\n".join(
            f"| {licence.replace('|', ' or ')} | {count} |" for licence, count in licences.most_common()
        ),
        "clap_command": clap["command"],
        "clap_seed": clap["recipe"]["trainer"]["seed"],
        "clap_steps": clap["recipe"]["trainer"]["max_steps"],
        "clap_minutes": round(clap["seconds"] / 60),
        "clap_cosine": f"{clap['result']['cosine']:.3f}",
        "command": training["command"],
        "seed": training["recipe"]["seed"],
        "steps": training["recipe"]["max_steps"],
        "batch": training["recipe"]["per_device_train_batch_size"],
        "minutes": round(training["seconds"] / 60),
        "examples": f"{training['rows']['seen']:,}",
        "memory_size": training["recipe"]["memory_size"],
        "noise_variance": training["noise_variance"],
        "santa": ", ".join(f"{key} {value}" for key, value in training["recipe"]["santa"].items()),
        "torch": training["versions"]["torch"],
        "transformers": training["versions"]["transformers"],
        "results": "\n".join(_result_rows(results)),
        "clips": results["esc10_fold4"]["clips"],
    }
    card = checkpoint / "README.md"
    card.write_text(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")
    return card


def _result_rows(results: dict) -> list[str]:
    names = {
        "esc10_fold4": "**full: Santa as shipped**",
        "esc10_fold4_without_santa": "without Santa (raw audio embedding)",
        "esc10_fold4_memory_only": "without the audio embedding (memory only)",
        "examples": "the ten example sounds (full)",
    }
    return [
        f"| {title} | {results[key]['clips']} | {results[key]['named']:.3f} | {results[key]['matched']:.3f} | "
        f"{results[key]['clap_zero_shot']:.3f} |"
        for key, title in names.items()
    ]


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    print(write_card(parser.parse_args().checkpoint))
