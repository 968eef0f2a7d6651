"""Holds `MsClapModel`, converted from an msclap checkpoint, to msclap 1.3.4 itself.

    make parity                       # compares; fails beyond 1e-4
    make parity RECORD=1              # and records what `make test` compares with

msclap cannot share our environment, so `make parity` sets up one for it. No model hub is needed: the full-size
checkpoint is written by msclap's own module with weights by formula, and the tokenizer follows a formula too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_mats import MsClapModel
from modeling_mats.convert_msclap import convert_msclap
from modeling_mats.modeling_msclap import pool_text
from processing_mats import MsClapFeatureExtractor

from .msclap_inputs import QUIRK_TEXT, SAMPLING_RATE, waveform, write_tokenizer

HERE = Path(__file__).parent
TOLERANCE = 1e-4
RECORDED = ("msclap_reference.npz", "msclap_keys.json")


@torch.no_grad()
def measure(
    model: MsClapModel, extractor: MsClapFeatureExtractor, tokenizer: PreTrainedTokenizerBase, reference: dict
) -> dict[str, tuple[float, float]]:
    """Compares a converted model with msclap's numbers.

    Args:
        reference: Content of msclap_reference.npz.

    Returns:
        `{what: (largest absolute difference, largest absolute value of msclap's)}`.
    """
    pairs = {}
    features = extractor([waveform(name) for name in reference["waveforms"]], sampling_rate=SAMPLING_RATE)
    pairs["audio tower"] = model.audio_model(**features).pooler_output, reference["audio_tower"]
    pairs["audio projected"] = (
        model.get_audio_features(**features, normalize=False).pooler_output,
        reference["audio_embeds"],
    )

    keep = reference["texts"] != QUIRK_TEXT
    texts = [text + model.config.text_suffix for text in reference["texts"][keep]]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    length = tokens["input_ids"].shape[1]
    theirs, attended = reference["input_ids"][keep, :length], reference["attention_mask"][keep]
    if not np.array_equal(np.where(attended[:, :length], tokens["input_ids"], 0), theirs) or attended[:, length:].any():
        raise AssertionError("The tokenizer gives other ids than msclap's.")
    hidden = model.text_model(**tokens).last_hidden_state
    pooled = pool_text(hidden, tokens["attention_mask"], model.config.text_pooling)
    pairs["text tower"] = pooled, reference["text_tower"][keep]
    pairs["text projected"] = (
        model.get_text_features(**tokens, normalize=False).pooler_output,
        reference["text_embeds"][keep],
    )

    for kind in ("audio", "text"):
        ours, theirs = pairs[f"{kind} projected"]
        pairs[f"{kind} normalised"] = F.normalize(ours, dim=-1), F.normalize(torch.from_numpy(theirs), dim=-1)
    result = {}
    for what, (ours, theirs) in pairs.items():
        theirs = np.asarray(theirs)
        result[what] = float(np.abs(ours.numpy() - theirs).max()), float(np.abs(theirs).max())
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Where msclap-venv is and the large files go.")
    parser.add_argument("--record", action="store_true", help="Write msclap_reference.npz and msclap_keys.json here.")
    args = parser.parse_args()
    text_folder = write_tokenizer(args.folder / "gpt2-formula")

    start = time.perf_counter()
    python = args.folder / "msclap-venv/bin/python"
    command = [python, "-m", "peers.msclap_reference", args.folder]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    theirs = time.perf_counter()
    convert_msclap(args.folder / "CLAP_formula.pth", args.folder / "clap", tokenizer=text_folder)
    converted = time.perf_counter()

    reference = dict(np.load(args.folder / "msclap_reference.npz"))
    model = MsClapModel.from_pretrained(args.folder / "clap").eval()
    extractor = MsClapFeatureExtractor.from_pretrained(args.folder / "clap")
    result = measure(model, extractor, AutoTokenizer.from_pretrained(args.folder / "clap"), reference)
    settings = json.loads((args.folder / "clap/preprocessor_config.json").read_text())

    print(f"\nmsclap ran in {theirs - start:.1f} s, the conversion in {converted - theirs:.1f} s.")
    print(f"Mel bank: sr={settings['mel_sampling_rate']}, fmax={settings['frequency_max']}")
    for kind in ("audio", "text"):
        unit = reference[f"{kind}_embeds"] / np.linalg.norm(reference[f"{kind}_embeds"], axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
        print(f"Cosines between msclap's {len(unit)} {kind} embeddings: {cosines.min():.3f} to {cosines.max():.3f}")
    print(f"\n{'':18}{'max |difference|':>18}{'max |value|':>14}  (tolerance {TOLERANCE:g})")
    for what, (difference, value) in result.items():
        print(f"{what:18}{difference:18.2e}{value:14.3f}  {'ok' if difference <= TOLERANCE else 'TOO FAR'}")
    if any(difference > TOLERANCE for difference, _ in result.values()):
        sys.exit(1)
    if args.record:
        for name in RECORDED:
            shutil.copyfile(args.folder / name, HERE / name)


if __name__ == "__main__":
    main()
