"""Tables of an ablation: means and spreads over seeds, as JSON and as Markdown."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation.ablation.plan import Plan, Setting
from evaluation.ablation.run import INPUTS_FILE, RESULTS_FILE, ZERO_SHOT_FILE, read_lines

SUMMARY_FILE = "ablation.json"
REPORT_FILE = "ablation.md"
# As headings, in this order.
SCORES = {
    "matched": "matched",
    "named": "named",
    "cider_d": "CIDEr-D, unread captions",
    "cider_d_all": "CIDEr-D, all captions",
}

# The values of all seeds, by set of clips and score.
SeedScores = dict[str, dict[str, list[float]]]


def score_of(values: Sequence[float]) -> dict[str, Any]:
    """A score over seeds: `mean`, `spread` (standard deviation, `None` for one seed) and each seed's value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "spread": spread, "values": list(values)}


def tell_score(score: Mapping[str, Any]) -> str:
    """Such as "0.812 ± 0.014"."""
    return f"{score['mean']:.3f}" if score["spread"] is None else f"{score['mean']:.3f} ± {score['spread']:.3f}"


def summarise(plan: Plan, output: Path) -> dict[str, Any]:
    """What an ablation found, and writes `ablation.json` and `ablation.md` into its folder.

    The first method is the one that the others are compared with: `below_full` is by how much a method falls short of
    it, seed by seed.

    Raises:
        ValueError: the ablation is not finished.
    """
    inputs = json.loads((output / INPUTS_FILE).read_text(encoding="utf-8"))
    found = {(line["setting"], line["seed"]): line["scores"] for line in read_lines(output / RESULTS_FILE)}
    missing = [f"{s.run_name}, seed {seed}" for s, seed in plan.settings() if (s.key, seed) not in found]
    if missing:
        raise ValueError(f"{len(missing)} settings of the plan have no scores yet, the first is of {missing[0]}.")

    def over_seeds(setting: Setting, seeds: Sequence[int]) -> SeedScores:
        each = [found[setting.key, seed] for seed in seeds]
        return {
            clips: {score: [scores[clips][score] for scores in each] for score in each[0][clips]} for clips in each[0]
        }

    first = next(iter(plan.methods.values()))
    methods, below = {}, {}
    for name, setting in plan.methods.items():
        seeds = plan.seeds_of(name)
        values = over_seeds(setting, seeds)
        methods[name] = _scores(values)
        below[name] = _scores(_differences(over_seeds(first, seeds), values))
    sweeps = []
    for sweep in plan.sweeps:
        points = [
            {"value": value, "scores": _scores(over_seeds(setting, sweep.seeds))}
            for value, setting in plan.points(sweep)
        ]
        described = {name: getattr(sweep, name) for name in ("symbol", "place", "parameter", "seeds")}
        sweeps.append({**described, "points": points})
    summary = {
        "recipe": plan.recipe.name,
        "overrides": dict(plan.overrides),
        "seeds": list(plan.seeds),
        "inputs": {name: inputs[name] for name in ("clap_fingerprint", "texts")},
        "clips": {name: len(own["clips"]) for name, own in inputs["sets"].items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn", "mats")},
        "zero_shot": json.loads((output / ZERO_SHOT_FILE).read_text(encoding="utf-8")),
        "methods": methods,
        "below_full": below,
        "sweeps": sweeps,
    }
    (output / REPORT_FILE).write_text(to_markdown(summary), encoding="utf-8")
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (output / SUMMARY_FILE).write_text(text, encoding="utf-8")
    return summary


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The tables of methods and sweeps."""
    seeds = ", ".join(map(str, summary["seeds"]))
    count = len(summary["seeds"])
    parts = ["## Methods", f"Mean ± standard deviation over {count} trainings (seeds {seeds}).", methods_table(summary)]
    for name, scores in summary["zero_shot"].items():
        told = ", ".join(f"{key} {value:.3f}" for key, value in scores.items())
        parts.append(f"CLAP alone on {name}: {told}.")
    parts += ["## Below the full method", "Difference, seed by seed.", below_full_table(summary)]
    for sweep in summary["sweeps"]:
        parts += [f"## {sweep['symbol']} ({sweep['parameter']})", sweep_table(sweep)]
    return "\n\n".join(parts) + "\n"


def methods_table(summary: Mapping[str, Any]) -> str:
    """Every method with every score, in Markdown."""
    return _score_table("method", _told_with_seeds(summary, summary["methods"]).items())


def below_full_table(summary: Mapping[str, Any]) -> str:
    """By how much each method falls short of the first, seed by seed, in Markdown."""
    return _score_table("method", list(_told_with_seeds(summary, summary["below_full"]).items())[1:])


def sweep_table(sweep: Mapping[str, Any]) -> str:
    """Every value of a sweep with every score, in Markdown."""
    seeds = len(sweep["seeds"])
    head = f"{sweep['symbol']} ({seeds} seed{'s' if seeds > 1 else ''})"
    return _score_table(head, [(f"{point['value']:g}", point["scores"]) for point in sweep["points"]])


def _told_with_seeds(summary: Mapping[str, Any], methods: Mapping[str, Any]) -> dict[str, Any]:
    """The methods, those with fewer seeds than the others so named."""
    told = {}
    for name, scores in methods.items():
        count = len(next(iter(next(iter(scores.values())).values()))["values"])
        told[name if count == len(summary["seeds"]) else f"{name} ({count} seed{'s' if count > 1 else ''})"] = scores
    return told


def _score_table(head: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    rows = list(rows)
    columns = [(clips, score) for clips, scores in rows[0][1].items() for score in SCORES if score in scores]
    lines = [[head, *(f"{clips}: {SCORES[score]}" for clips, score in columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *(tell_score(scores[clips][score]) for clips, score in columns)] for name, scores in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _scores(values: SeedScores) -> dict[str, dict[str, Any]]:
    return {clips: {score: score_of(own) for score, own in scores.items()} for clips, scores in values.items()}


def _differences(first: SeedScores, second: SeedScores) -> SeedScores:
    """`first` minus `second`, seed by seed."""
    return {
        clips: {score: [a - b for a, b in zip(first[clips][score], own, strict=True)] for score, own in scores.items()}
        for clips, scores in second.items()
    }


__all__ = [
    "REPORT_FILE",
    "SCORES",
    "SUMMARY_FILE",
    "below_full_table",
    "methods_table",
    "summarise",
    "sweep_table",
    "tell_score",
    "to_markdown",
]
