"""qcore quantize: a checkpoint and conversations in, an artifact out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qcore.cli.shared import Shared, python_call, shared_options, size

if TYPE_CHECKING:
    from qcore.data.shapes import Shape
    from qcore.model import Artifact, Model
    from qcore.recipe import Recipe

DONE_WITH_FALLBACKS = 4
# Flags that are fields of a Recipe under the same name.
RECIPE_FLAGS = (
    *("method", "bits", "group_size", "symmetric", "scale_search", "act_order", "damp_ratio"),
    "propagate",
    *("n_samples", "max_length", "seed", "allow_fallback", "allow_low_bits"),
)


@click.command(
    "quantize",
    short_help="A checkpoint and conversations in, an artifact out.",
    epilog="Example: qcore quantize ./support-8b --calib chats.jsonl -o ./support-8b-w4",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--calib", type=click.Path(path_type=Path), help="Your conversations: JSONL or text.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the artifact.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="TOML or JSON.")
@click.option("--method", type=click.Choice(["rtn", "gptq", "awq", "awq+gptq"]), help="[gptq]")
@click.option("--bits", type=int, help="2, 3, 4 or 8. [4]")
@click.option(
    "--group-size",
    type=int,
    help="Input channels per scale: 32, 64, 128, 256, or -1 for the whole row."
    " [the largest of 128, 64, 32 that divides every layer]",
)
@click.option("--symmetric/--no-symmetric", default=None, help="Zeros fixed at the middle. [no]")
@click.option(
    "--scale-search",
    type=click.Choice(["auto", "conditional", "diagonal", "mse", "minmax"]),
    help="What a column's error counts when the scale of its group is searched. [auto]",
)
@click.option("--act-order", type=click.Choice(["group", "none"]), help="[group]")
@click.option("--damp-ratio", type=float, help="Share of the mean diagonal added to it. [0.03]")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["auto", "gptq", "gptq_v2", "awq", "ct"]),
    default="auto",
    show_default=True,
    help="Layout of the artifact; ct is compressed-tensors.",
)
@click.option("--keep", multiple=True, metavar="GLOB", help="Layers to leave as they are; repeat.")
@click.option(
    "--propagate", type=click.Choice(["quantized", "reference", "corrected"]), help="[quantized]"
)
@click.option("--n-samples", type=int, help="Calibration samples. [256]")
@click.option("--max-length", type=int, help="Tokens per sample. [2048]")
@click.option(
    "--shape", type=click.Choice(["messages", "text", "token_ids"]), help="Take only such rows."
)
@click.option("--seed", type=int, help="Seed of the choice of samples. [0]")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@click.option(
    "--allow-fallback", type=int, metavar="N", help="Layers that may be rounded plainly. [0]"
)
@click.option("--allow-low-bits", metavar="REASON", help="Why fewer than 4 bits are wanted.")
@click.option("--dry-run", is_flag=True, help="Print every value and where it came from; stop.")
@shared_options(progress=True)
@click.pass_context
def command(
    context: click.Context,
    shared: Shared,
    /,
    model: Path,
    calib: Path | None,
    out: Path | None,
    recipe_file: Path | None,
    format_name: str,
    keep: tuple[str, ...],
    shape: Shape | None,
    overwrite: bool,
    dry_run: bool,
    **flags: Any,
) -> int:
    """Quantize MODEL (a Hugging Face folder or a GGUF file) into an artifact.

    The original is only read. The artifact appears when it is complete and verified, or not at
    all.
    """
    given = {name: flags[name] for name in RECIPE_FLAGS if flags[name] is not None}
    if out is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--out': where the artifact goes.", context)
    if shared.print_python:
        text = _python(model, calib, out, recipe_file, given, keep, shape, format_name, overwrite)
        shared.result({"python": text}, text.splitlines())
        return 0
    from qcore.recipe import Recipe

    recipe = Recipe.load(recipe_file) if recipe_file else Recipe()
    recipe = recipe.with_(**given)
    for pattern in keep:
        recipe = recipe.with_(layers=pattern, keep=True)
    if dry_run:
        rows = _sources(context, recipe, recipe_file)
        shared.result(
            {name: {"value": value, "from": source} for name, value, source in rows},
            [f"{name:<20} {value!s:<20} {source}" for name, value, source in rows],
        )
        return 0
    assert out is not None
    return _run(shared, model, calib, out, recipe, shape, format_name, overwrite)


def _run(
    shared: Shared,
    path: Path,
    calib: Path | None,
    out: Path,
    recipe: Recipe,
    shape: Shape | None,
    format_name: str,
    overwrite: bool,
) -> int:
    import qcore

    model = qcore.open(path)
    shared.note("model", repr(model))
    calibration = None
    if calib is not None and recipe.needs_data:
        calibration = qcore.Calibration.build(
            calib,
            model=model,
            n_samples=recipe.n_samples,
            max_length=recipe.max_length,
            seed=recipe.seed,
            shape=shape,
        )
        shared.note("calibration", repr(calibration))
    shared.note("recipe", recipe.explain())
    with shared.reporter() as progress:
        artifact = qcore.quantize(
            model,
            recipe,
            calib=calibration,
            out=out,
            format=format_name,
            overwrite=overwrite,
            progress=progress,
        )
    return report(shared, model, artifact, out, recipe.allow_fallback)


def report(shared: Shared, model: Model, artifact: Artifact, out: Path, allowed: int) -> int:
    """Prints what was made; the exit status says whether layers fell back unallowed."""
    fallbacks = list(artifact.record["fallbacks"])
    next_command = f"qcore eval {out} --against {model.path} --data HELDOUT.jsonl"
    data = {
        "out": str(out),
        "digest": artifact.digest,
        "bytes": {"base": model.bytes, "artifact": artifact.bytes},
        "fallbacks": fallbacks,
        "warnings": shared.warnings,
        "next": next_command,
    }
    lines = [
        f"bytes        {size(model.bytes)} -> {size(artifact.bytes)}",
        f"done         {out}   {str(artifact.digest)[:19]}...   fallbacks {len(fallbacks)}"
        f"   warnings {len(shared.warnings)}",
        f"next         {next_command}",
    ]
    shared.result(data, lines)
    return DONE_WITH_FALLBACKS if len(fallbacks) > allowed else 0


def _sources(
    context: click.Context, recipe: Recipe, recipe_file: Path | None
) -> list[tuple[str, Any, str]]:
    """(setting, value, where it came from) of every setting."""
    from qcore.recipe import Recipe

    loaded = Recipe.load(recipe_file).to_dict() if recipe_file else {}
    default = Recipe().to_dict()
    rows = []
    for name, value in recipe.to_dict().items():
        source = "default"
        if name in loaded and loaded[name] != default[name]:
            source = str(recipe_file)
        if name in context.params and _typed(context, name):
            source = "flag"
        if name == "overrides" and context.params["keep"]:
            source = "flag --keep"
        rows.append((name, value, source))
    for name in ("model", "calib", "out", "format_name", "shape", "overwrite"):
        source = "flag" if _typed(context, name) else "default"
        rows.append((name.removesuffix("_name"), context.params[name], source))
    return rows


def _typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _python(
    model: Path,
    calib: Path | None,
    out: Path | None,
    recipe_file: Path | None,
    given: dict[str, Any],
    keep: tuple[str, ...],
    shape: Shape | None,
    format_name: str,
    overwrite: bool,
) -> str:
    lines = ["import qcore as qc", "", python_call("qc.open", [repr(str(model))], {}, result="m")]
    base = python_call("qc.Recipe.load", [repr(str(recipe_file))], {}) if recipe_file else ""
    if base:
        lines.append(f"recipe = {base}")
        if given:
            lines.append(python_call("recipe.with_", [], given, result="recipe"))
    else:
        lines.append(python_call("qc.Recipe", [], given, result="recipe"))
    lines += [f"recipe = recipe.with_(layers={pattern!r}, keep=True)" for pattern in keep]
    if calib is not None:
        settings = [f"{name}=recipe.{name}" for name in ("n_samples", "max_length", "seed")]
        built = [repr(str(calib)), "model=m", *settings]
        lines.append(python_call("qc.Calibration.build", built, {"shape": shape}, result="calib"))
    arguments = ["m", "recipe", *(["calib=calib"] if calib is not None else [])]
    options = {
        "out": str(out) if out else None,
        "format": None if format_name == "auto" else format_name,
        "overwrite": overwrite or None,
    }
    lines.append(python_call("qc.quantize", arguments, options, result="artifact"))
    return "\n".join(lines)
