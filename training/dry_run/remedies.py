"""Changes to a recipe with which training would fit."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from training.dry_run.report import Remedy, Setup, name_devices
from training.recipe import ModelArguments

MOST_DEVICES = 8


def find_remedies(
    arguments: ModelArguments, setup: Setup, usable: int, size_of: Callable[[Setup], int]
) -> tuple[Remedy, ...]:
    """Changes that each take memory away; where none of them is enough, all at once; and more devices.

    Args:
        usable (`int`): bytes that training may take.
        size_of: bytes that it takes in a setup.
    """
    remedies, together, size = [], setup, size_of(setup)
    for text, change in _changes(arguments, setup):
        if (changed := size_of(replace(setup, **change))) < size:
            remedies.append(Remedy(text, changed))
            together = replace(together, **change)
    if setup.rows > 1:
        rows = _largest_micro_batch(setup, usable, size_of)
        remedies.append(Remedy(f"per_device_train_batch_size: {rows}", size_of(replace(setup, rows=rows))))
        together = replace(together, rows=rows)
    if len(remedies) > 1 and all(remedy.size > usable for remedy in remedies):
        remedies.append(Remedy("all of these at once", size_of(together)))
    if not setup.on_cpu:
        devices, size = _fewest_devices(setup, usable, size_of)
        remedies.append(Remedy(f"--fsdp on {name_devices(devices)}", size))
        if all(remedy.size > usable for remedy in remedies):
            devices, size = _fewest_devices(together, usable, size_of)
            remedies.append(Remedy(f"all of these and --fsdp on {name_devices(devices)}", size))
    return tuple(remedies)


def _changes(arguments: ModelArguments, setup: Setup) -> Iterator[tuple[str, dict]]:
    """Fields of the recipe that take memory away, and the same in a setup."""
    if not setup.checkpointing:
        yield "activation_checkpointing: true", {"checkpointing": True}
    if setup.compute is None:
        yield "bf16: true", {"compute": torch.bfloat16}
    if arguments.train_language_model:
        return
    if setup.weights == torch.float32 and not setup.bits:
        yield "language_model_dtype: bfloat16", {"weights": torch.bfloat16}
    if setup.bits != 4 and not setup.on_cpu:
        yield "load_in_4bit: true, language_model_dtype: bfloat16", {"bits": 4, "weights": torch.bfloat16}


def _largest_micro_batch(setup: Setup, usable: int, size_of: Callable[[Setup], int]) -> int:
    """Rows of the largest smaller micro-batch that fits, by halving; 1 where none does."""
    # The peak is the largest of sums that grow evenly with the rows, so between 1 and all it is below a straight line.
    least, most = size_of(replace(setup, rows=1)), size_of(setup)
    rows = setup.rows // 2
    while rows > 1 and least + (most - least) * (rows - 1) / (setup.rows - 1) > usable:
        rows //= 2
    return rows


def _fewest_devices(setup: Setup, usable: int, size_of: Callable[[Setup], int]) -> tuple[int, int]:
    """Devices over which FSDP makes it fit, at most `MOST_DEVICES`, and the bytes of each."""
    devices = setup.devices if setup.sharded else max(2, setup.devices)
    while (size := size_of(replace(setup, sharded=True, devices=devices))) > usable and devices < MOST_DEVICES:
        devices *= 2
    return devices, size
