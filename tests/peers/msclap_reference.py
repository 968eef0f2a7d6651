"""Runs msclap 1.3.4 itself, in an environment of its own, and saves what it computes.

Started by `parity.py` (`make parity`), from the folder `tests`:

    ../.parity/msclap-venv/bin/python -m peers.msclap_reference ../.parity

Reads the tokenizer in `<folder>/gpt2-formula`. Writes `<folder>/CLAP_formula.pth`, a checkpoint in msclap's own format
whose weights follow `msclap_weights.py`, and `<folder>/msclap_reference.npz`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from msclap.CLAPWrapper import CLAPWrapper
from transformers import GPT2Config, GPT2Model

from .msclap_inputs import QUIRK_TEXT, SAMPLING_RATE, TEXTS, WAVEFORMS, waveform
from .msclap_weights import constant_tensor, weight_tensor


class FormulaCLAP(CLAPWrapper):
    """msclap with a local text model, and waveforms by name where it reads files."""

    text_folder: str

    def read_config_as_args(self, *args, **kwargs):
        settings = super().read_config_as_args(*args, **kwargs)
        settings.text_model = self.text_folder
        return settings

    def read_audio(self, audio_path, resample=True):
        return torch.from_numpy(waveform(audio_path))[None], SAMPLING_RATE


def write_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Builds msclap's model, fills it by formula and saves it in msclap's format; returns the state dict."""
    torch.save({"model": {}}, path)  # msclap loads with strict=False, so this gives its model as constructed
    state = FormulaCLAP(model_fp=path, version="2023").clap.state_dict()
    for name, tensor in state.items():
        if name.endswith(".melW"):
            continue
        constant = constant_tensor(name, tuple(tensor.shape))
        if constant is None:
            state[name] = torch.from_numpy(weight_tensor(name, tuple(tensor.shape)))
        elif not np.allclose(constant, tensor.numpy(), rtol=0, atol=1e-6):
            worst = np.abs(constant - tensor.numpy()).max()
            sys.exit(f"{name}: msclap's own constant differs from msclap_weights.py by up to {worst}.")
    torch.save({"model": state}, path)
    return state


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    text_folder, checkpoint = folder / "gpt2-formula", folder / "CLAP_formula.pth"

    GPT2Model(GPT2Config()).save_pretrained(text_folder)  # msclap asks for weights, which the checkpoint replaces
    FormulaCLAP.text_folder = str(text_folder)
    state = write_checkpoint(checkpoint)
    clap = FormulaCLAP(model_fp=checkpoint, version="2023")

    # msclap returns only what its projections give; what goes into them is taken by hooks.
    towers = {}
    for encoder in ("audio_encoder", "caption_encoder"):
        projection = getattr(clap.clap, encoder).projection
        projection.register_forward_hook(lambda _, inputs, __, encoder=encoder: towers.update({encoder: inputs[0]}))

    result = {"audio_embeds": clap.get_audio_embeddings(WAVEFORMS, resample=False)}
    result["audio_tower"] = towers["audio_encoder"]
    texts = [*TEXTS, QUIRK_TEXT]
    result["text_embeds"] = clap.get_text_embeddings(texts)
    result["text_tower"] = towers["caption_encoder"]
    tokens = clap.preprocess_text(texts)
    result["input_ids"], result["attention_mask"] = tokens["input_ids"].short(), tokens["attention_mask"].bool()
    result["mel_bank"] = state["audio_encoder.base.htsat.logmel_extractor.melW"]

    arrays = {name: tensor.detach().numpy() for name, tensor in result.items()}
    np.savez_compressed(folder / "msclap_reference.npz", texts=np.array(texts), waveforms=np.array(WAVEFORMS), **arrays)
    keys = {name: list(tensor.shape) for name, tensor in state.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(shape)}" for name, shape in keys.items())
    (folder / "msclap_keys.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
