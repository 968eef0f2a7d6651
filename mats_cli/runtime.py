"""What every verb needs: errors in one line, quiet libraries, and a model."""

import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup

from training.bundled import bundled_model

if TYPE_CHECKING:  # imported where it is used: transformers takes seconds
    from processing_mats.pipeline_mats import AudioTextToTextPipeline

OUR_MODULES = r"(configuration_mats|modeling_mats|processing_mats|mats_cli)\b"
ANNOUNCE_AFTER_SECONDS = 2.0


@dataclass
class Settings:
    """Options of `mats` itself, before any verb."""

    verbose: bool = False


settings = Settings()


class OneLineErrors(TyperGroup):
    """Tells in one line what a user can mend, such as a missing file; programming errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `mats ... | head`: Click ends silently
            raise
        except Exception as error:
            if settings.verbose or not is_mendable(error):
                raise
            fail(error)


def is_mendable(error: Exception) -> bool:
    """Whether an error is about what came in, by the convention of these packages, and not about the code."""
    return isinstance(error, (ValueError, OSError)) or type(error).__name__ == "SafetensorError"


def fail(error: Exception | str) -> NoReturn:
    """Ends the command with an error message."""
    say(f"Error: {one_line(error)}")
    raise typer.Exit(1)


def say(message: str) -> None:
    """Writes to stderr, which is where everything but results goes."""
    typer.echo(message, err=True)


def one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())


def to_json(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False)


def quieten() -> None:
    """Silences what the libraries say of themselves. What these packages warn of, such as silence, is told."""
    from transformers.utils import logging as transformers_logging

    if settings.verbose:
        logging.basicConfig(level=logging.INFO)
        transformers_logging.set_verbosity_info()
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=OUR_MODULES)
    warnings.showwarning = lambda message, *_, **__: say(f"Warning: {one_line(message)}")


@contextmanager
def announced(message: str) -> Iterator[None]:
    """Says what is going on, to a terminal only, where it takes longer than a moment."""
    timer = threading.Timer(ANNOUNCE_AFTER_SECONDS, say, [message])
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def resolve_model(model: str | None) -> str:
    """A checkpoint folder or a Hub repo; the bundled model where none is named."""
    if model is None:
        bundled = bundled_model()
        if not bundled.is_dir():
            raise FileNotFoundError(f"The bundled model is not there ({bundled}); name one with --model.")
        return str(bundled)
    if not Path(model).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise FileNotFoundError(f"No such checkpoint: {model}. Expected a folder, or a Hub repo such as you/mats-gpt2.")
    return model


def check_is_mats(model: str) -> None:
    """transformers itself would only log that a checkpoint is of another type, and go on with random weights."""
    from transformers import PreTrainedConfig

    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"{model} is no checkpoint: it has no config.json.")
    config, _ = PreTrainedConfig.get_config_dict(model)
    if config.get("model_type") != "mats":
        raise ValueError(f"{model} is a checkpoint of type {config.get('model_type')!r}, expected 'mats'.")


class Source(NamedTuple):
    """A checkpoint (`None`: the bundled one), and for a light one, where its parts lie if not where it says."""

    model: str | None
    language_model: str | None = None
    clap: str | None = None


def load_pipeline(
    model: str | None, language_model: str | None = None, clap: str | None = None
) -> "AudioTextToTextPipeline":
    """The pipeline of a checkpoint, on the accelerator if there is one.

    For a light checkpoint, `language_model` and `clap` say where these are, if not where the checkpoint says.
    """
    name = resolve_model(model)
    with announced(f"Loading {name} ..."):
        from modeling_mats import MatsForConditionalGeneration
        from processing_mats import MatsProcessor
        from processing_mats.pipeline_mats import AudioTextToTextPipeline

        quieten()
        check_is_mats(name)
        return AudioTextToTextPipeline(
            model=MatsForConditionalGeneration.from_pretrained(name, language_model=language_model),
            processor=MatsProcessor.from_pretrained(name, clap=clap),
        )
