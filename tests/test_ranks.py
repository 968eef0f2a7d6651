"""Training on two ranks learns what one learns from the same global batches, and writes what one reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, make_model
from safetensors.torch import load_file
from train_on_ranks import STEPS, train

from modeling_mats import MatsForConditionalGeneration

LAUNCH = ROOT / "training" / "launch"


def start(folder: Path, runs: list[dict], ranks: int = 2) -> None:
    """Does the runs one after the other, on the loopback interface and any free port."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"]
    loopback = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "train_on_ranks.py"), str(file)],
        env={**os.environ, **loopback, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def kinds(folder) -> dict[str, dict]:
    """What is trained: GPT-2 (tied embeddings) and Llama whole, and LoRA in a frozen Llama."""
    make_model("llama").language_model.save_pretrained(folder / "language-model")
    return {
        "gpt2": {"kind": "gpt2"},
        "llama": {"kind": "llama"},
        "lora": {"kind": "llama", "language_model": str(folder / "language-model")},
    }


@pytest.fixture(scope="module")
def one_rank(folder, kinds) -> dict[str, Path]:
    """The same on one rank: its batch is the others' global batch."""
    outs = {name: folder / f"one-{name}" for name in kinds}
    for name, out in outs.items():
        out.mkdir()
        train(str(out), **kinds[name], per_device_train_batch_size=8, per_device_eval_batch_size=8)
    return outs


@pytest.fixture(scope="module")
def ddp(folder, kinds) -> dict[str, Path]:
    batch = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    runs = {name: {**kind, **batch} for name, kind in kinds.items()}
    runs["accumulated"] = {**runs["lora"], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    noisy = {**runs["lora"], "noise": 0.015, "dropout": 0.1}
    runs["noisy"] = {**noisy, "save_strategy": "steps", "save_steps": STEPS // 2}
    runs["resumed"] = {**noisy, "resume": str(folder / "ddp-noisy" / "checkpoints" / f"checkpoint-{STEPS // 2}")}
    runs["noise"] = {**runs["lora"], "noise": 0.015}
    runs["unseeded"] = {**runs["noise"], "seeded_noise": False}
    start(folder, [{"folder": str(folder / f"ddp-{name}"), **run} for name, run in runs.items()])
    return {name: folder / f"ddp-{name}" for name in runs}


@pytest.fixture(scope="module")
def fsdp(folder, kinds) -> dict[str, Path]:
    """With the settings of `training/launch/fsdp.yaml`."""
    config = yaml.safe_load((LAUNCH / "fsdp.yaml").read_text())["fsdp_config"]
    config = {name.removeprefix("fsdp_"): value for name, value in config.items()}
    settings = {"fsdp": True, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    runs = {name: {**kind, **settings, "fsdp_config": config} for name, kind in kinds.items()}
    noisy = {**runs["lora"], "noise": 0.015, "dropout": 0.1}
    runs["noisy"] = {**noisy, "save_strategy": "steps", "save_steps": STEPS // 2}
    runs["resumed"] = {**noisy, "resume": str(folder / "fsdp-noisy" / "checkpoints" / f"checkpoint-{STEPS // 2}")}
    runs["recomputed"] = {**runs["lora"], "activation_checkpointing": True}
    start(folder, [{"folder": str(folder / f"fsdp-{name}"), **run} for name, run in runs.items()])
    return {name: folder / f"fsdp-{name}" for name in runs}


def record(out: Path) -> dict:
    return json.loads((out / "record.json").read_text())


def assert_same_run(first: Path, second: Path, atol: float = 1e-5) -> None:
    assert record(first)["loss"] == pytest.approx(record(second)["loss"], abs=atol)
    one, other = load_file(first / "weights.safetensors"), load_file(second / "weights.safetensors")
    for name in one.keys() | other.keys():
        if "lm_head" in name and not (name in one and name in other):
            continue  # tied to the table of embeddings, which is compared
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "lora", "accumulated"])
def test_two_ranks_learn_what_one_does(one_rank, ddp, name):
    """Loss and gradient are means over the answer tokens of all ranks, although one has far more than the other."""
    assert record(ddp[name])["ranks"] == 2
    assert record(ddp[name])["wrapped_by"] == "DistributedType.MULTI_CPU"
    reference = one_rank.get(name, one_rank["lora"])
    assert_same_run(reference, ddp[name])
    assert record(ddp[name])["eval_loss"] == pytest.approx(record(reference)["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "lora", "recomputed"])
def test_fsdp_learns_what_one_rank_does(one_rank, fsdp, name):
    assert record(fsdp[name])["wrapped_by"] == "DistributedType.FSDP"
    reference = one_rank.get(name, one_rank["lora"])
    assert record(fsdp[name])["local_parameters"] < 0.7 * record(reference)["local_parameters"]
    assert_same_run(reference, fsdp[name])


@pytest.mark.parametrize("name", ["gpt2", "llama", "lora"])
def test_one_rank_loads_what_fsdp_saves(one_rank, fsdp, name):
    loaded = MatsForConditionalGeneration.from_pretrained(fsdp[name] / "model").state_dict()
    expected = MatsForConditionalGeneration.from_pretrained(one_rank[name] / "model").state_dict()
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(loaded[key], tensor, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("wrapped_by", ["ddp", "fsdp"])
def test_a_run_resumed_on_as_many_ranks_is_the_same_to_the_bit(request, wrapped_by):
    outs = request.getfixturevalue(wrapped_by)
    whole, resumed = (load_file(outs[name] / "weights.safetensors") for name in ("noisy", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert record(outs["noisy"])["loss"][STEPS // 2 :] == record(outs["resumed"])["loss"][-STEPS // 2 :]


def noise_of(out: Path, rank: int) -> torch.Tensor:
    return load_file(out / f"noise-{rank}.safetensors")["noise"]


def test_the_noise_of_a_row_does_not_depend_on_the_number_of_ranks(kinds, ddp, tmp_path):
    train(str(tmp_path), **kinds["lora"], noise=0.015, per_device_train_batch_size=8)
    both = torch.cat([noise_of(ddp["noise"], rank) for rank in (0, 1)], dim=1)
    torch.testing.assert_close(noise_of(tmp_path, 0), both, atol=1e-6, rtol=0)
    assert_same_run(tmp_path, ddp["noise"])


def test_no_rank_draws_what_another_draws(ddp):
    """The Trainer seeds all ranks alike: without more, dropout and unseeded noise would be the same on all of them."""
    first, second = (torch.nn.functional.normalize(noise_of(ddp["unseeded"], rank), dim=-1) for rank in (0, 1))
    assert (first * second).sum(-1).mean().abs() < 0.2  # the same noise would have about 0.9


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.name)
def test_accelerate_reads_the_launch_files(file):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    assert load_config_from_file(str(file)).distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    known = vars(launch_command_parser().parse_args(["script.py"]))
    fields = yaml.safe_load(file.read_text())
    for name in [*fields.get("fsdp_config", {}), *fields.get("deepspeed_config", {})]:
        assert name in known, f"accelerate launch has no option {name}"
    command = ["--config_file", str(file), "--num_processes", "2", "script.py"]
    _validate_launch_command(launch_command_parser().parse_args(command))
