"""Asks the bundled mats-tiny about the example sounds: `make demo`.

The sounds are one clip of each ESC-10 class, the first CC0 one by file name of a fold that no part of mats-tiny was
trained on (see examples/sounds/metadata.csv).
"""

import csv
import time
import warnings
from pathlib import Path

import transformers

ROOT = Path(__file__).parent.parent
QUESTION = "What is making this sound?"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    started = time.perf_counter()
    from modeling_mats import MatsForConditionalGeneration
    from processing_mats import AudioTextToTextPipeline, MatsProcessor

    folder = ROOT / "hub_cards" / "mats-tiny"
    model = MatsForConditionalGeneration.from_pretrained(folder)
    pipe = AudioTextToTextPipeline(model=model, processor=MatsProcessor.from_pretrained(folder))
    print(f"mats-tiny loaded in {time.perf_counter() - started:.1f} s. Asking: {QUESTION}\n")

    with (ROOT / "examples" / "sounds" / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = [row["label"] for row in rows]
    print(f"{'file':<20} {'answer':<34} {'among ten labels':<18} nearest memory of Santa")
    started = time.perf_counter()
    right = 0
    for row in rows:
        sound = ROOT / "examples" / "sounds" / row["file_name"]
        embeds = pipe.processor.encode_audio(str(sound))
        asked = pipe({"audio_embeds": embeds, "text": QUESTION}, return_evidence=True)
        matched = pipe({"audio_embeds": embeds}, candidate_labels=labels)
        right += matched["label"] == row["label"]
        evidence = asked["santa"][0]
        print(
            f"{row['file_name']:<20} {asked['generated_text']:<34} {matched['label']:<18} "
            f"{evidence['weight']:.2f} {evidence['text']}"
        )
    seconds = (time.perf_counter() - started) / len(rows)
    print(f"\n{right} of {len(rows)} labels right; {seconds:.2f} s a sound for both questions.")
    print('Try your own:  .venv/bin/mats ask SOUND "What is making this sound?"')


if __name__ == "__main__":
    main()
