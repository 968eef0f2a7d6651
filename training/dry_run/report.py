"""The plan of a run and its report."""

from dataclasses import dataclass

import torch

GB = 10**9
# Part of a device's memory that nothing is planned into: the CUDA context, the kernels' workspaces, fragmentation.
FREE_PART = 0.1
CACHING, TRAINING, EVALUATION = "CLAP's embeddings, once before it", "Training", "Evaluation"


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the model, and how many of them are trained."""

    name: str
    parameters: int
    trained: int = 0


@dataclass(frozen=True)
class Need:
    """What one thing takes of a device's memory, in bytes; `exact`, or found by tracing."""

    name: str
    size: int
    exact: bool = True


@dataclass(frozen=True)
class Phase:
    """Part of a run, with all that lies in a device's memory at once."""

    name: str
    needs: tuple[Need, ...]

    @property
    def size(self) -> int:
        return sum(need.size for need in self.needs)


@dataclass(frozen=True)
class RowLengths:
    """Positions of a training row, audio positions and template included.

    Attributes:
        mean (`float`): over the sources, and over the rows of each.
        longest (`int`): that 99 of 100 rows of every source do not exceed; memory is planned for it.
        answer (`int`): labelled positions, that 99 of 100 rows of every source do not exceed.
        origin (`str`): where the figures come from.
        rows (`int`, *optional*): rows to train on, where the steps depend on them.
    """

    mean: float
    longest: int
    answer: int
    origin: str
    rows: int | None = None


@dataclass(frozen=True)
class Setup:
    """What decides over the memory of training and can be chosen.

    Attributes:
        weights (`torch.dtype`): precision of a pretrained language model's weights.
        bits (`int`, *optional*): 4 or 8, where it is quantised.
        compute (`torch.dtype`, *optional*): precision of autocast, where it is on.
        checkpointing (`bool`): whether activations are computed again in the backward pass.
        rows (`int`): of a micro-batch.
        devices (`int`): on which copies are trained, or with `sharded` (FSDP) parts.
        on_cpu (`bool`): whether they are CPUs, whose fused attention knows no dropout.
    """

    weights: torch.dtype
    bits: int | None
    compute: torch.dtype | None
    checkpointing: bool
    rows: int
    devices: int
    sharded: bool
    on_cpu: bool


@dataclass(frozen=True)
class Remedy:
    """A change to the recipe, and the bytes of a device that training would take with it."""

    change: str
    size: int


@dataclass(frozen=True)
class Device:
    """One device's memory in bytes."""

    name: str
    memory: int

    @property
    def usable(self) -> int:
        return round(self.memory * (1 - FREE_PART))


@dataclass(frozen=True)
class Plan:
    """What a run would take. `str()` is the report.

    Attributes:
        name (`str`): the recipe's.
        parts: parameters, CLAP's first.
        steps (`int`, *optional*): of the optimizer; `None` where they depend on data that is not here.
        accumulation (`int`): micro-batches in a step.
        setup, lengths, device: what the memory is planned for.
        phases: CLAP's embedding, training, and where there is something to evaluate on, evaluation.
        other_checkpointing (`int`): bytes of training with activation checkpointing switched over.
        remedies: what would help, where training does not fit.
        origins: where sizes come from that are not the recipe's own.
    """

    name: str
    parts: tuple[Part, ...]
    steps: int | None
    accumulation: int
    setup: Setup
    lengths: RowLengths
    device: Device
    phases: tuple[Phase, ...]
    other_checkpointing: int
    remedies: tuple[Remedy, ...]
    origins: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(phase.size <= self.device.usable for phase in self.phases)

    def __str__(self) -> str:
        sections = [
            [f"Dry run of {self.name}: nothing is downloaded or trained.", *self.origins],
            self._parameter_lines(),
            self._step_lines(),
            self._memory_lines(),
            self._fit_lines(),
        ]
        return "\n\n".join("\n".join(section) for section in sections)

    def _parameter_lines(self) -> list[str]:
        clap = [part for part in self.parts if part.name.startswith("CLAP")]
        rest = [part for part in self.parts if part not in clap]
        totals = [
            Part(name, sum(p.parameters for p in parts), sum(p.trained for p in parts))
            for name, parts in (("without CLAP", rest), ("with CLAP", self.parts))
        ]
        rows = [(part.name, _millions(part.parameters), _millions(part.trained)) for part in (*self.parts, *totals)]
        return [f"{'Parameters':34}{'all':>12}{'trained':>12}"] + [
            f"  {name:32}{parameters:>12}{trained:>12}" for name, parameters, trained in rows
        ]

    def _step_lines(self) -> list[str]:
        setup, lengths = self.setup, self.lengths
        batch = setup.rows * self.accumulation * setup.devices
        split = f"{setup.rows} in a micro-batch x {self.accumulation} accumulated x {name_devices(setup.devices)}"
        length = f"{lengths.mean:.0f} positions"
        if lengths.mean != lengths.longest:
            length += f" on average, at most {lengths.longest} in 99 of 100 rows"
        lines = ["Steps", f"  rows in a step      {batch:,} = {split}", f"  length of a row     {length}"]
        lines += [f"                      {part}" for part in lengths.origin.split("; ")]
        if self.steps is None:
            return [*lines, "  steps               depend on the number of rows; set max_steps, or give --data_dir"]
        rows = self.steps * batch
        lines.insert(1, f"  steps               {self.steps:,}")
        return [*lines, f"  in all              {rows:,} rows, {rows * lengths.mean / 1e6:,.0f} M positions"]

    def _memory_lines(self) -> list[str]:
        lines = [f"{'Memory of a device':58}{'GB':>8}"]
        for phase in self.phases:
            lines.append(f"  {phase.name}")
            lines += [
                f"    {need.name:54}{_gigabytes(need.size):>8}  {'exact' if need.exact else 'traced'}"
                for need in phase.needs
            ]
            lines.append(f"    {'in all':54}{_gigabytes(phase.size):>8}")
            if phase.name == TRAINING:
                switched = f"in all {'without' if self.setup.checkpointing else 'with'} activation checkpointing"
                lines.append(f"    {switched:54}{_gigabytes(self.other_checkpointing):>8}")
        return lines

    def _fit_lines(self) -> list[str]:
        device = self.device
        free = f"{_gigabytes(device.memory - device.usable)} GB of it left free for context, workspaces, fragmentation"
        lines = [f"Device: {device.name}, {_gigabytes(device.memory)} GB, {free}."]
        for phase in self.phases:
            if (over := phase.size - device.usable) <= 0:
                continue
            largest = max(phase.needs, key=lambda need: need.size)
            lines.append(
                f"Does not fit, by {_gigabytes(over)} GB: {phase.name.lower()}. Its largest need is {largest.name}, "
                f"{_gigabytes(largest.size)} GB."
            )
            if phase.name == EVALUATION and over < phase.needs[-1].size:
                lines.append("    A smaller per_device_eval_batch_size takes less.")
            if phase.name == TRAINING:
                lines.append("  In all, with")
                lines += [
                    f"    {remedy.change:54}{_gigabytes(remedy.size):>8}  "
                    + ("fits" if remedy.size <= device.usable else "does not fit yet")
                    for remedy in self.remedies
                ]
        return [*lines, "It fits."] if self.fits else lines


def name_devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count else "-"


def _gigabytes(size: int) -> str:
    return f"{size / GB:,.2f}"
