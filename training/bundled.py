"""The bundled model, whose CLAP the small recipes listen with: their field `clap` names it by `mats-tiny`."""

from importlib.util import find_spec
from pathlib import Path

BUNDLED_MODEL = "mats-tiny"


def bundled_model() -> Path:
    """Where the default model lies beside the installed code."""
    return Path(find_spec("hub_cards").submodule_search_locations[0]) / BUNDLED_MODEL


def resolve_clap(name: str) -> str:
    """A folder or Hub id as it is; `mats-tiny` as the folder of the bundled model."""
    return str(bundled_model()) if name == BUNDLED_MODEL and not Path(name).is_dir() else name


__all__ = ["bundled_model", "resolve_clap"]
