"""Trains small models by the stock `Trainer`, on as many ranks as it is started on; `test_ranks.py` compares them.

    torchrun --standalone --nproc_per_node 2 tests/train_on_ranks.py RUNS.json

RUNS.json is a list of runs, each with the arguments of `train`.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import state
from accelerate.utils import DistributedType
from conftest import SENTENCES, make_model, make_tokenizer
from datasets import Dataset
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_mats.modeling_mats import MatsNoise
from processing_mats import MatsProcessor
from training.callbacks import RankSeed
from training.collator import MatsCollator

STEPS = 10


class FsdpOnCpu:
    """Lets accelerate run FSDP on CPUs: torch can (gloo), but accelerate takes DDP there without a word."""

    def __enter__(self):
        self.original = original = state.AcceleratorState.__init__

        def patched(self, *args, fsdp_plugin=None, **kwargs):
            original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
            if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
                if self.mixed_precision != "no":
                    fsdp_plugin.set_mixed_precision(self.mixed_precision)
                self.fsdp_plugin = fsdp_plugin
                self.distributed_type = DistributedType.FSDP
                state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

        state.AcceleratorState.__init__ = patched

    def __exit__(self, *error):
        state.AcceleratorState.__init__ = self.original


class Listener(TrainerCallback):
    """Notes the noise that each step adds, up to the scale that the normalisation takes."""

    def __init__(self):
        self.heard = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        noise = next(module for module in model.modules() if isinstance(module, MatsNoise))
        noise.register_forward_hook(self._listen)

    def _listen(self, noise, inputs, output):
        if noise.training:
            self.heard.append((output - (output * inputs[0]).sum(-1, keepdim=True) * inputs[0]).detach().clone())


def make_rows(count: int = 96) -> Dataset:
    """Answers of very different lengths, which fall together with the first and the second half of each 8 rows."""
    torch.manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(count, 16), dim=1).tolist()
    answers = [" ".join([SENTENCES[number % 10]] * (3 if number % 8 < 4 else 1)) for number in range(count)]
    columns = {"text_embeds": embeds, "instruction": ["What is it?"] * count, "answer": answers}
    return Dataset.from_dict({**columns, "noise_seed": range(count)})


def train(
    folder: str,
    kind: str = "llama",
    language_model: str | None = None,
    noise: float = 0.0,
    dropout: float = 0.0,
    seeded_noise: bool = True,
    resume: str | None = None,
    fsdp: bool = False,
    **arguments,
) -> None:
    """One run. `language_model` is a folder with the weights that `make_model(kind)` has; with it, LoRA is trained."""
    out = Path(folder)
    model = make_model(kind, noise_variance=noise)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    if language_model is not None:
        model.config.language_model_name_or_path = language_model
        torch.manual_seed(1)
        model.add_lora(r=4, lora_dropout=dropout)
    rows = make_rows() if seeded_noise else make_rows().remove_columns("noise_seed")
    settings = {
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "use_cpu": True,
        "seed": 0,
        "report_to": [],
        "disable_tqdm": True,
        **arguments,
    }
    listener = Listener()
    with FsdpOnCpu():
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(out / "checkpoints"), fsdp=fsdp, **settings),
            train_dataset=rows,
            eval_dataset=rows.select(range(16)),
            data_collator=MatsCollator(MatsProcessor(make_tokenizer(), num_audio_tokens=4, max_positions=128)),
            callbacks=[listener, RankSeed()],
        )
    trainer.train(resume_from_checkpoint=resume)
    record = {
        "ranks": trainer.accelerator.num_processes,
        "wrapped_by": str(trainer.accelerator.distributed_type),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "local_parameters": sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters()),
    }
    trainer.save_model(str(out / "model"))
    weights = trainer.accelerator.get_state_dict(trainer.model)
    rank = trainer.args.process_index
    save_file({"noise": torch.stack(listener.heard)}, out / f"noise-{rank}.safetensors")
    if rank == 0:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, out / "weights.safetensors")
        (out / "record.json").write_text(json.dumps(record))
    if record["ranks"] > 1:
        torch.distributed.barrier()


if __name__ == "__main__":
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        Path(settings["folder"]).mkdir(exist_ok=True)
        train(**settings)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
