"""qcore generate: text from a checkpoint or an artifact."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qcore.cli.shared import Shared, python_call, shared_options


@click.command(
    "generate",
    short_help="Text from a checkpoint or an artifact.",
    epilog='Example: qcore generate ./support-8b-w4 --prompt "Where is my parcel?" --new 64',
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What the user says; - reads standard input.")
@click.option("--system", help="A system message before it.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without a chat template.")
@click.option(
    "--new", "max_new_tokens", type=click.IntRange(min=1), default=64, show_default=True,
    help="Tokens at most.",
)  # fmt: skip
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="0 takes the likeliest token.",
)  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the k likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from this mass.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--activations", type=click.Choice(["float32", "bfloat16", "int8"]), help="[the checkpoint's]"
)
@shared_options(progress=True)
def command(
    shared: Shared,
    /,
    model: Path,
    prompt: str,
    system: str | None,
    raw: bool,
    **sampling: object,
) -> None:
    """Let MODEL answer a prompt; the same seed gives the same text."""
    if prompt == "-":
        prompt = sys.stdin.read()
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    asked: str | list[dict[str, str]] = prompt if raw else messages
    options = {key: value for key, value in sampling.items() if value is not None}
    if shared.print_python:
        call = python_call("m.generate", [repr(asked)], options)
        text = f"import qcore as qc\n\nm = qc.open({str(model)!r})\nprint({call})"
        shared.result({"python": text}, text.splitlines())
        return
    import qcore

    text = qcore.open(model).generate(asked, **options)
    shared.result({"text": text}, [text])
