"""`mats describe`: a chat model writes descriptions of labels, for training on classification."""

from pathlib import Path
from typing import Annotated

import typer

from mats_cli.runtime import announced, quieten, say

TOO_FEW = 3  # the exit code where labels have too few descriptions; 1 and 2 are errors


def describe(
    labels: Annotated[
        Path,
        typer.Argument(
            help="A .json file ({label: index}, or a list), a .csv file, or a text file with a label on each line.",
            show_default=False,
        ),
    ],
    model: Annotated[str, typer.Option(help="A chat model: a folder or a Hub repo; with --base-url, its name there.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    base_url: Annotated[
        str | None,
        typer.Option(
            help="An OpenAI-compatible endpoint, such as http://localhost:8000/v1. Its token, if it wants one, is read "
            "from the environment variable MATS_CHAT_TOKEN."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Descriptions for each label.")] = 10,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="Descriptions to go by: a .txt file with one on each line, or a .jsonl file as this command writes.",
            show_default="six of ours",
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of a .csv file that holds the labels.")] = None,
    max_words: Annotated[int, typer.Option(min=2, help="Longer descriptions are refused.")] = 25,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts at a time.", show_default="8, 4 for an endpoint")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Where a reply is cut off.", show_default="512, 4096 for an endpoint")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the examples shown and of the sampling.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a file that is there.")] = False,
) -> None:
    """Have a chat model write descriptions of labels. Exit code 3: some labels have fewer than --count."""
    with announced(f"Loading {model} ..."):
        from training.audiotia import chat_models, descriptions

        quieten()
        wanted = descriptions.read_labels(labels, column)
        shown = descriptions.EXAMPLES if examples is None else descriptions.read_described(examples)
        given = {"batch_size": batch_size, "max_tokens": max_tokens}
        settings = {name: value for name, value in given.items() if value is not None}
        if base_url is None:
            chat = chat_models.LocalChatModel.from_pretrained(model, **settings)
        else:
            chat = chat_models.EndpointChatModel(base_url, model, **settings)
    report = descriptions.write_descriptions(
        wanted, chat, count, out, examples=shown, seed=seed, max_words=max_words, resume=resume
    )
    say(f"Wrote {out}: {report}")
    if report.short:
        raise typer.Exit(TOO_FEW)
