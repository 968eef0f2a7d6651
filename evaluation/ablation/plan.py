"""What an ablation compares: a YAML plan of methods and sweeps over one training recipe.

A method changes how the model is trained (`train`: fields of the recipe), what is in its memory (`memory`: fields of
the recipe too, but the trained model is used as it is), how Santa acts (`santa`), or what becomes of the audio
embedding before (`correction`). Methods with the same `train` share one trained model for each seed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from evaluation.ablation.corrections import CORRECTIONS
from processing_mats.processing_mats import DEFAULT_SANTA_SETTINGS
from training.recipe import read_yaml_mapping

# What the command line says, or the ablation itself.
RESERVED = ("cache_dir", "clap", "clap_subfolder", "data_dir", "output_dir", "resume", "seed")
PLACES = ("train", "memory", "santa")
MEMORY_FIELDS = ("memory_size", "memory_clusters", "memory_shares", "memory_noise_variance")


@dataclass(frozen=True)
class Setting:
    """One way to train and to ask. An empty one is the recipe as it is."""

    train: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    santa: bool | Mapping[str, Any] | None = None
    correction: str | None = None

    def __post_init__(self):
        if self.correction is not None and self.correction not in CORRECTIONS:
            raise ValueError(f"There is no correction {self.correction!r}, expected {', '.join(CORRECTIONS)}.")
        if reserved := sorted(set(self.train).intersection(RESERVED)):
            raise ValueError(f"train has {', '.join(reserved)}, which the ablation itself sets.")
        if unknown := sorted(set(self.memory) - set(MEMORY_FIELDS)):
            raise ValueError(f"memory has {', '.join(unknown)}, expected {', '.join(MEMORY_FIELDS)}.")
        if isinstance(self.santa, Mapping) and (unknown := sorted(set(self.santa) - set(DEFAULT_SANTA_SETTINGS))):
            raise ValueError(f"santa has {', '.join(unknown)}, expected {', '.join(DEFAULT_SANTA_SETTINGS)}.")

    @property
    def run_name(self) -> str:
        """Name of the trained model, such as `full` or `noise_variance=0.0`."""
        return ",".join(f"{name}={_short(value)}" for name, value in self.train.items()) or "full"

    @property
    def key(self) -> str:
        """The setting as text: equal for equal settings."""
        parts = {"train": self.train, "memory": self.memory, "santa": self.santa, "correction": self.correction}
        return json.dumps(parts, sort_keys=True)


@dataclass(frozen=True)
class Sweep:
    """One number varied, all else as in the recipe.

    Attributes:
        place (`str`): `train`, `memory` or `santa`.
        parameter (`str`): field of it.
        values: what it takes.
        seeds: those of the plan, or fewer where each value needs a training of its own.
        symbol (`str`): the paper's letter for it.
    """

    place: str
    parameter: str
    values: Sequence[float]
    seeds: Sequence[int]
    symbol: str

    def __post_init__(self):
        if self.place not in PLACES:
            raise ValueError(f"A sweep varies something in {self.place!r}, expected {', '.join(PLACES)}.")
        if not self.values:
            raise ValueError(f"The sweep of {self.parameter} has no values.")
        if odd := [value for value in self.values if isinstance(value, bool) or not isinstance(value, (int, float))]:
            raise ValueError(f"The sweep of {self.parameter} has the value {odd[0]!r}, expected numbers.")

    def setting(self, value: float) -> Setting:
        return Setting(**{self.place: {self.parameter: value}})


@dataclass(frozen=True)
class ClipSet:
    """Held-out clips: of one `group`, or of `packages`; `labels` are the clips' `own` or all that are `described`."""

    name: str
    group: str | None = None
    packages: Sequence[str] = ()
    labels: str = "own"
    captions: bool = False

    def __post_init__(self):
        if isinstance(self.packages, str):
            raise ValueError(f"packages of {self.name!r} is the one string {self.packages!r}, expected a list.")
        if (self.group is None) == (not self.packages):
            raise ValueError(f"The clip set {self.name!r} needs either a group or packages.")
        if self.labels not in ("own", "described"):
            raise ValueError(f"labels of {self.name!r} is {self.labels!r}, expected own or described.")


@dataclass(frozen=True)
class Plan:
    """A whole ablation; see the module's docstring."""

    recipe: Path
    descriptions: Path
    overrides: Mapping[str, Any]
    seeds: Sequence[int]
    clips: Sequence[ClipSet]
    methods: Mapping[str, Setting]
    sweeps: Sequence[Sweep]
    method_seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)  # of methods with fewer seeds than the plan

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Reads a plan; `recipe` and `descriptions` are relative to its file. One that `extends` another has all that
        this has, and methods and sweeps of its own.

        Raises:
            FileNotFoundError: no such plan.
            ValueError: an unknown field, or one that contradicts another.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No such plan of an ablation: {path}")
        content = read_yaml_mapping(path)
        if "extends" in content:
            content = _extended(path.parent / content.pop("extends"), content)
        try:
            seeds = list(content["seeds"])
            content["sweeps"] = [
                _make(Sweep, "A sweep", {"seeds": seeds, **sweep}) for sweep in content.get("sweeps", [])
            ]
            methods = {name: dict(fields or {}) for name, fields in content["methods"].items()}
            content["method_seeds"] = {n: list(f.pop("seeds")) for n, f in methods.items() if "seeds" in f}
            content["methods"] = {n: _make(Setting, f"The method {n!r}", f) for n, f in methods.items()}
            content["clips"] = [
                _make(ClipSet, f"The clip set {name!r}", {"name": name, **fields})
                for name, fields in content["clips"].items()
            ]
            files = {name: path.parent / content.pop(name) for name in ("recipe", "descriptions")}
            plan = cls(**{"overrides": {}, **content, **files})
        except KeyError as error:
            raise ValueError(f"{path} is no plan of an ablation: it has no {error.args[0]}.") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no plan of an ablation: {error}") from error
        for file in files.values():
            if not file.is_file():
                raise FileNotFoundError(f"{path} names {file}, which is not there.")
        plan.check()
        return plan

    def check(self) -> None:
        """Raises `ValueError` for seeds that a sweep has and the plan has not, or methods without the full one."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}, expected different ones.")
        if reserved := sorted(set(self.overrides).intersection(RESERVED)):
            raise ValueError(f"overrides has {', '.join(reserved)}, which the ablation itself sets.")
        wanted = {f"The sweep of {sweep.parameter}": sweep.seeds for sweep in self.sweeps}
        wanted |= {f"The method {name!r}": seeds for name, seeds in self.method_seeds.items()}
        for what, seeds in wanted.items():
            if extra := sorted(set(seeds) - set(self.seeds)):
                raise ValueError(f"{what} has the seeds {extra}, the plan {list(self.seeds)}.")
        if not self.methods or next(iter(self.methods.values())) != Setting():
            raise ValueError("The first method is the one that the others are compared with: the recipe as it is, {}.")

    def seeds_of(self, method: str) -> Sequence[int]:
        return self.method_seeds.get(method, self.seeds)

    def points(self, sweep: Sweep) -> list[tuple[float, Setting]]:
        """The values of a sweep with their settings; a value that the recipe has anyway needs no training."""
        base = read_yaml_mapping(self.recipe) | dict(self.overrides)
        if sweep.place != "train":
            return [(value, sweep.setting(value)) for value in sweep.values]
        return [
            (value, Setting() if base.get(sweep.parameter) == value else sweep.setting(value)) for value in sweep.values
        ]

    def settings(self) -> list[tuple[Setting, int]]:
        """Every setting with every seed that it is wanted for, once, those of one trained model together."""
        wanted = [(setting, seed) for name, setting in self.methods.items() for seed in self.seeds_of(name)]
        for sweep in self.sweeps:
            wanted += [(setting, seed) for _, setting in self.points(sweep) for seed in sweep.seeds]
        different = {(setting.key, seed): (setting, seed) for setting, seed in wanted}
        names = [setting.run_name for setting, _ in different.values()]  # what is wanted first is trained first
        return sorted(different.values(), key=lambda pair: (names.index(pair[0].run_name), pair[1]))

    def runs(self) -> list[tuple[Setting, int]]:
        """One setting for each model to train, and its seed."""
        different = {}
        for setting, seed in self.settings():
            different.setdefault((setting.run_name, seed), (Setting(train=setting.train), seed))
        return list(different.values())


def _extended(path: Path, own: dict[str, Any]) -> dict[str, Any]:
    """The plan in a file with more methods and sweeps."""
    if not path.is_file():
        raise FileNotFoundError(f"No such plan of an ablation: {path}")
    if other := sorted(set(own) - {"methods", "sweeps"}):
        raise ValueError(f"A plan that extends {path.name} may add methods and sweeps, it has {', '.join(other)}.")
    base = read_yaml_mapping(path)
    return {
        **base,
        "methods": {**base.get("methods", {}), **own.get("methods", {})},
        "sweeps": [*base.get("sweeps", []), *own.get("sweeps", [])],
    }


def _make(kind: type, what: str, fields_given: Mapping[str, Any]) -> Any:
    """One part of a plan; an unknown field is told with what there is."""
    known = [each.name for each in fields(kind)]
    if unknown := sorted(set(fields_given) - set(known)):
        raise ValueError(f"{what} has {', '.join(unknown)}, expected {', '.join(known)}.")
    return kind(**fields_given)


def _short(value: Any) -> str:
    """A value in the name of a folder."""
    if isinstance(value, Mapping):
        return "-".join(f"{key}{_short(item)}" for key, item in value.items())
    return str(value).replace("/", "-")


__all__ = ["ClipSet", "Plan", "Setting", "Sweep"]
