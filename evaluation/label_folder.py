"""How often a checkpoint tells what a sound is, over a `datasets` audiofolder with a `label` column.

    python -m evaluation.label_folder --model hub_cards/mats-tiny --sounds examples/sounds

Three figures on the same clips: CLAP alone, zero-shot, over the folder's labels; the generated answer matched to those
labels by text embedding (the paper's protocol for classification); and the share of free answers to an open question
that name the source in so many words. Every question, answer and judgement goes into `--output`, one JSON a line.
"""

import argparse
import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_mats import MatsForConditionalGeneration
from processing_mats import AudioTextToTextPipeline, MatsProcessor
from processing_mats.pipeline_mats import CLASSIFY_INSTRUCTION
from training.evaluate_clap import embed_labels

OPEN_QUESTION = "What is making this sound?"
# Whole words of which an answer must hold one to have named the source; a label not listed must occur itself.
NAMES = {
    "baby cry": ("baby", "infant", "newborn"),
    "chainsaw": ("chainsaw", "chain saw"),
    "clock tick": ("clock", "watch"),
    "dog bark": ("dog", "dogs"),
    "fire crackling": ("fire", "campfire", "fireplace"),
    "helicopter": ("helicopter",),
    "person sneeze": ("sneeze", "sneezes", "sneezing"),
    "rain": ("rain", "raining", "rainstorm"),
    "rooster": ("rooster", "cock", "cockerel"),
    "sea waves": ("sea", "ocean", "waves", "surf"),
}
# Other sources that share a word with one of those.
OTHERS = re.compile(r"\b(sea lion|alarm clock|fire alarm|fire engine|sea ?gull)s?\b")


@dataclass(frozen=True)
class Judgement:
    """What was asked about one clip, what came back, and what was made of it."""

    file_name: str
    label: str
    answer: str
    named: bool
    classified_answer: str
    matched: str
    clap: str


def read_labels(sounds: Path, group: str | None = None) -> list[tuple[str, str]]:
    """`(file_name, label)` of the clips of an audiofolder, of one `group` where given."""
    with (sounds / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["file_name"], row["label"]) for row in csv.DictReader(file) if group in (None, row.get("group"))]
    if not rows:
        raise ValueError(f"{sounds / 'metadata.csv'} has no clips of group {group!r}.")
    return rows


def names_source(answer: str, label: str) -> bool:
    """Whether an answer names the label's source, by the words of `NAMES`."""
    heard = OTHERS.sub("", answer.lower())
    return any(re.search(rf"\b{re.escape(name)}\b", heard) for name in NAMES.get(label, (label,)))


def encode_clips(pipe: AudioTextToTextPipeline, sounds: Path, clips: Sequence[tuple[str, str]]) -> torch.Tensor:
    """CLAP embeddings `(clips, dim)`, once for all questions and settings."""
    return torch.cat([pipe.processor.encode_audio(sounds / name) for name, _ in tqdm(clips, desc="CLAP", delay=2)])


def judge(
    pipe: AudioTextToTextPipeline,
    clips: Sequence[tuple[str, str]],
    embeds: torch.Tensor,
    santa: bool | dict | None = None,
    batch_size: int = 16,
) -> list[Judgement]:
    """Asks about every clip, given its embedding."""
    labels = sorted({label for _, label in clips})
    nearest = (embeds @ embed_labels(pipe.processor.clap, labels).T).argmax(1).tolist()
    rows = [{"audio_embeds": embed} for embed in embeds]
    settings = {"batch_size": batch_size, "santa": santa}
    open_answers = pipe(rows, text=OPEN_QUESTION, **settings)
    classified = pipe(rows, text=CLASSIFY_INSTRUCTION, candidate_labels=labels, **settings)
    return [
        Judgement(
            file_name=name,
            label=label,
            answer=answer["generated_text"],
            named=names_source(answer["generated_text"], label),
            classified_answer=chosen["generated_text"],
            matched=chosen["label"],
            clap=labels[number],
        )
        for (name, label), answer, chosen, number in zip(clips, open_answers, classified, nearest, strict=True)
    ]


def summarise(judgements: Sequence[Judgement]) -> dict[str, float]:
    """The three accuracies, in the order of the module's docstring."""
    count = len(judgements)
    return {
        "clips": count,
        "clap_zero_shot": sum(j.clap == j.label for j in judgements) / count,
        "matched": sum(j.matched == j.label for j in judgements) / count,
        "named": sum(j.named for j in judgements) / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--language_model", help="a light checkpoint's language model, if not where that says")
    parser.add_argument("--sounds", type=Path, required=True, help="audiofolder with metadata.csv: file_name, label")
    parser.add_argument("--group", help="only rows with this value in the column `group`")
    parser.add_argument("--santa", type=json.loads, help='settings as JSON, e.g. {"weight": 0.5}, or false')
    parser.add_argument("--output", type=Path, help="JSONL of every judgement")
    options = parser.parse_args()
    pipe = AudioTextToTextPipeline(
        model=MatsForConditionalGeneration.from_pretrained(options.model, language_model=options.language_model),
        processor=MatsProcessor.from_pretrained(options.model),
    )
    clips = read_labels(options.sounds, options.group)
    judgements = judge(pipe, clips, encode_clips(pipe, options.sounds, clips), options.santa)
    if options.output is not None:
        options.output.write_text("".join(json.dumps(asdict(j)) + "\n" for j in judgements), encoding="utf-8")
    print(json.dumps(summarise(judgements)))


if __name__ == "__main__":
    main()
