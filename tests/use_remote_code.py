"""Loads an exported checkpoint as a stranger would: transformers is there, our packages are not.

    python -S -P tests/use_remote_code.py EXPORT SOUND SAVE_TO

Prints one JSON object; `tests/test_export.py` compares it with what the packages give, and exports `SAVE_TO` again.
"""

import importlib.util
import json
import sys

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

QUESTION = "What is making this sound?"
LABELS = ["dog", "a rooster", "rain"]


def main(export: str, sound: str, save_to: str) -> dict:
    packages = ("configuration_mats", "modeling_mats", "processing_mats")
    found = [name for name in packages if importlib.util.find_spec(name)]
    assert not found, f"{found} can be imported, so this would prove nothing"

    remote = {"trust_remote_code": True}
    model = AutoModelForMultimodalLM.from_pretrained(export, **remote)
    processor = AutoProcessor.from_pretrained(export, **remote)
    inputs = processor(text=QUESTION, audio=sound)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)

    pipe = pipeline("audio-text-to-text", model=export, **remote)
    answer = pipe(sound, text=QUESTION, candidate_labels=LABELS, return_evidence=True, max_new_tokens=8)

    model.save_pretrained(save_to)
    processor.save_pretrained(save_to)
    others = (AutoModel, AutoModelForCausalLM)
    return {
        "audio_embeds": inputs["audio_embeds"].tolist(),
        "tokens": tokens.tolist(),
        "answer": answer,
        "classes": [type(auto.from_pretrained(export, **remote)).__name__ for auto in others],
        "modules": sorted({type(thing).__module__.split(".")[0] for thing in (model, processor, pipe)}),
        "pipeline": type(pipe).__name__,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(*sys.argv[1:])))
