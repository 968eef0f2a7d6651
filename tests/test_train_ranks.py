"""`mats train` by torchrun on two CPU ranks is the run of one rank: rows, noise, embeddings, checkpoint and all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from run_parts import ADAPTED, arguments, write_parts, write_recipe
from safetensors.torch import load_file

from modeling_mats import MatsForConditionalGeneration
from training import train_mats


def torchrun(command: list[str], ranks: int = 2) -> str:
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(ranks)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"]
    loopback = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "training.train_mats", *command],
        env={**os.environ, **loopback},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, str]:
    """One rank and two with the same global batch; noise on, dropout off (which each rank draws for itself)."""
    folder = write_parts(tmp_path_factory.mktemp("ranks"))
    fields = {"language_model": str(folder / "language-model"), **ADAPTED, "lora_dropout": 0.0, "max_steps": 10}
    fields |= {"global_batch_size": 8, "held_out": 8, "noise_variance": 0.015, "save_steps": 5}
    one, two = folder / "one", folder / "two"
    recipe = write_recipe(folder, "ranks", **fields)
    train_mats.main(arguments(folder, recipe, one, "--per_device_train_batch_size", "8"))
    batches = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"]
    said = torchrun(arguments(folder, recipe, two, *batches))
    return one, two, said


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "training_record.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_two_ranks_have_the_losses_of_one(runs):
    one, two, _ = runs
    assert json.loads((two / "training_record.json").read_text())["devices"]["count"] == 2
    assert len(losses(one)) == 10
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)
    assert losses(one)[-1] < losses(one)[0]


def test_two_ranks_end_in_the_weights_of_one(runs):
    one, two, _ = runs
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-4, rtol=0, msg=name)
    assert (one / "santa_memory.safetensors").read_bytes() == (two / "santa_memory.safetensors").read_bytes()
    MatsForConditionalGeneration.from_pretrained(two)


def test_the_ranks_share_out_the_embeddings(runs):
    _, two, said = runs
    assert said.count("newly encoded") == 1  # told once
    assert len(list((two / "cache").glob("text-*/*.arrow"))) == 2  # one part of each rank


def test_held_out_texts_are_evaluated_alike(runs):
    one, two, _ = runs
    found = [
        json.loads((out / "training_record.json").read_text())["evaluation"]["eval_text_loss"] for out in (one, two)
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-3)
