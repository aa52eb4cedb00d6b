"""qcore quantize: a checkpoint and conversations in, an artifact out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qcore.cli.data_options import (
    Reading,
    Rendering,
    Replacing,
    reading_options,
    rendering_options,
    replacing_options,
)
from qcore.cli.shared import Shared, python_call, recipe_option, shared_options, size, table

if TYPE_CHECKING:
    from qcore.model import Artifact, Model
    from qcore.recipe import Recipe
    from qcore.trials import Choice

DONE_WITH_FALLBACKS = 4
# Flags that are fields of a Recipe under the same name.
RECIPE_FLAGS = (
    *("method", "bits", "group_size", "symmetric", "scale_search", "act_order", "damp_ratio"),
    *("propagate", "experts", "tuning_epochs"),
    *("n_samples", "max_length", "generic_share", "seed", "allow_fallback", "allow_low_bits"),
)


@click.command(
    "quantize",
    short_help="A checkpoint and conversations in, an artifact out.",
    epilog="Example: qcore quantize ./support-8b --calib chats.jsonl -o ./support-8b-w4",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--calib",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Your conversations: a file, folder or glob of any shape that `qcore data detect` shows.",
)
@click.option(
    "--generic",
    type=click.Path(path_type=Path),
    help="Text of another domain, for --generic-share or --choose.",
)
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    help="Statistics in place of --calib (qcore stats collect); implies --propagate reference.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the artifact.")
@recipe_option
@click.option("--method", type=click.Choice(["rtn", "gptq", "awq", "awq+gptq"]), help="[gptq]")
@click.option("--bits", type=int, help="2, 3, 4, 5, 6 or 8. [4]")
@click.option(
    "--group-size",
    type=int,
    help="Input channels per scale: 32, 64, 128, 256, or -1 for the whole row."
    " [the largest of 128, 64, 32 that divides most layers]",
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
    "--experts",
    type=click.Choice(["strict", "rtn", "all"]),
    help="Experts that few tokens reach: stop, round, or use all tokens. [strict]",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["auto", "gptq", "gptq_v2", "awq", "ct"]),
    default="auto",
    show_default=True,
    help="Layout of the artifact; ct is compressed-tensors.",
)
@click.option(
    "--choose",
    is_flag=True,
    help="Try candidate recipes and take the one that held-out conversations prefer;"
    " what was found is kept in OUT.choice.",
)
@click.option("--keep", multiple=True, metavar="GLOB", help="Layers to leave as they are; repeat.")
@click.option(
    "--propagate", type=click.Choice(["quantized", "reference", "corrected"]), help="[quantized]"
)
@click.option(
    "--tuning-epochs",
    type=int,
    help="Times through the samples to tune scales and norms by KL; 0 does not. [0]",
)
@click.option("--n-samples", type=int, help="Calibration samples. [256]")
@click.option("--max-length", type=int, help="Tokens per sample. [2048]")
@click.option(
    "--generic-share", type=float, help="Share of the samples taken from the generic text. [0]"
)
@click.option("--seed", type=int, help="Seed of the choice of samples. [0]")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@click.option(
    "--allow-fallback", type=int, metavar="N", help="Layers that may be rounded plainly. [0]"
)
@click.option("--allow-low-bits", metavar="REASON", help="Why fewer than 4 bits are wanted.")
@click.option("--dry-run", is_flag=True, help="Print every value and where it came from; stop.")
@reading_options
@rendering_options
@replacing_options
@shared_options(progress=True)
@click.pass_context
def command(
    context: click.Context,
    shared: Shared,
    /,
    model: Path,
    calib: Path | None,
    generic: Path | None,
    stats: Path | None,
    out: Path | None,
    recipe_file: Path | None,
    format_name: str,
    choose: bool,
    keep: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    reading: Reading,
    rendering: Rendering,
    replacing: Replacing,
    **flags: Any,
) -> int:
    """Quantize MODEL (a Hugging Face folder or a GGUF file) into an artifact.

    The original is only read. The artifact appears when it is complete and verified, or not at
    all.
    """
    given = {name: flags[name] for name in RECIPE_FLAGS if flags[name] is not None}
    if stats is not None and recipe_file is None:
        given.setdefault("propagate", "reference")
    if stats is not None and choose:
        raise click.UsageError("--choose needs conversations: give --calib, not --stats.", context)
    if out is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--out': where the artifact goes.", context)
    inputs = (model, calib, generic, stats, out, choose, reading, rendering, replacing)
    files = Files(*inputs, format_name, overwrite)
    if shared.print_python:
        text = _python(files, recipe_file, given, keep)
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
    return _run(shared, files, recipe)


@dataclass(frozen=True)
class Files:
    """What is read and written, and how."""

    model: Path
    calib: Path | None
    generic: Path | None
    stats: Path | None
    out: Path | None
    choose: bool
    reading: Reading
    rendering: Rendering
    replacing: Replacing
    format: str
    overwrite: bool


def _run(shared: Shared, files: Files, recipe: Recipe) -> int:
    import qcore
    from qcore.trials import JUDGED

    model = qcore.open(files.model)
    shared.note("model", repr(model))
    calibration = None
    if files.calib is not None and (recipe.needs_data or files.choose):
        calibration = qcore.Calibration.build(
            files.calib,
            model=model,
            n_samples=recipe.n_samples + (JUDGED if files.choose else 0),
            max_length=recipe.max_length,
            seed=recipe.seed,
            anonymize=files.replacing.anonymizer(),
            **files.reading.given(),
            **files.rendering.given(),
        )
        shared.note("calibration", repr(calibration))
    shared.note("recipe", recipe.explain())
    assert files.out is not None
    choice = None
    with shared.reporter() as progress:
        if files.choose:
            from qcore.formats import ArtifactWriter

            # A destination that will be refused is refused before the candidates are tried.
            with ArtifactWriter(files.out, overwrite=files.overwrite, sources=[model.path]):
                pass
            choice = qcore.choose(
                model,
                recipe,
                calib=calibration,
                generic=files.generic,
                out=evidence_folder(files.out),
                format=files.format,
                progress=progress,
            )
            recipe, calibration = choice.recipe, choice.calibration
            shared.note("chosen", choice.rows[choice.chosen].name)
        artifact = qcore.quantize(
            model,
            recipe,
            calib=calibration,
            # A set that was chosen has its share of it already.
            generic=None if files.choose else files.generic,
            stats=files.stats,
            out=files.out,
            choice=None if choice is None else choice.record(),
            format=files.format,
            overwrite=files.overwrite,
            progress=progress,
        )
    return report(shared, model, artifact, files.out, recipe.allow_fallback, choice)


def evidence_folder(out: Path) -> Path:
    """Where `--choose` keeps what it found: beside the artifact, for a stopped run to go on."""
    return out.with_name(f"{out.name}.choice")


def report(
    shared: Shared,
    model: Model,
    artifact: Artifact,
    out: Path,
    allowed: int,
    choice: Choice | None = None,
) -> int:
    """Prints what was made; the exit status says whether layers fell back unallowed."""
    fallbacks = list(artifact.record["fallbacks"])
    next_command = f"qcore eval {out} --against {model.path} --data HELDOUT.jsonl"
    data = {
        "out": str(out),
        "digest": artifact.digest,
        "bytes": {"base": model.bytes, "artifact": artifact.bytes},
        "fallbacks": fallbacks,
        "choice": choice and choice.to_dict(),
        "experts": artifact.record["experts"],
        "warnings": shared.warnings,
        "next": next_command,
    }
    lines = [
        *(str(choice).splitlines() if choice else ()),
        *expert_lines(artifact.record["experts"]),
        f"bytes        {size(model.bytes)} -> {size(artifact.bytes)}",
        f"done         {out}   {str(artifact.digest)[:19]}...   fallbacks {len(fallbacks)}"
        f"   warnings {len(shared.warnings)}",
        f"next         {next_command}",
    ]
    shared.result(data, lines)
    return DONE_WITH_FALLBACKS if len(fallbacks) > allowed else 0


def expert_lines(experts: list[dict[str, Any]]) -> list[str]:
    """How many calibration tokens the experts were given, one line a block; none without experts."""
    if not experts:
        return []
    rows = [("experts", "of", "fewest", "median", "most", "a channel", "all tokens", "rounded")]
    for entry in experts:
        tokens = sorted(entry["tokens"])
        counts = (tokens[0], tokens[len(tokens) // 2], tokens[-1])
        rows.append(
            (
                entry["name"],
                str(len(tokens)),
                *(f"{count:,}" for count in counts),
                f"{min(entry['tokens_per_channel']):.2g}",
                str(len(entry["every_token"])),
                str(len(entry["rounded"])),
            )
        )
    return [*table(rows, right=range(1, 8)), ""]


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
    named = (
        "model",
        "calib",
        "generic",
        "stats",
        "out",
        "format_name",
        "choose",
        "shape",
        "overwrite",
    )
    for name in named:
        source = "flag" if _typed(context, name) else "default"
        rows.append((name.removesuffix("_name"), context.params[name], source))
    return rows


def _typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _python(
    files: Files, recipe_file: Path | None, given: dict[str, Any], keep: tuple[str, ...]
) -> str:
    from qcore.trials import JUDGED

    opened = python_call("qc.open", [repr(str(files.model))], {}, result="m")
    lines = ["import qcore as qc", "", opened]
    options: dict[str, Any]
    base = python_call("qc.Recipe.load", [repr(str(recipe_file))], {}) if recipe_file else ""
    if base:
        lines.append(f"recipe = {base}")
        if given:
            lines.append(python_call("recipe.with_", [], given, result="recipe"))
    else:
        lines.append(python_call("qc.Recipe", [], given, result="recipe"))
    lines += [f"recipe = recipe.with_(layers={pattern!r}, keep=True)" for pattern in keep]
    if files.calib is not None:
        settings = [f"{name}=recipe.{name}" for name in ("n_samples", "max_length", "seed")]
        if files.choose:
            settings[0] += f" + {JUDGED}"
        built = [repr(str(files.calib)), "model=m", *settings, *files.rendering.python()]
        if files.rendering.template is not None:
            lines.insert(0, "from pathlib import Path\n")
        if files.replacing.wanted:
            built.append(f"anonymize={files.replacing.python()}")
        options = files.reading.options()
        lines.append(python_call("qc.Calibration.build", built, options, result="calib"))
    arguments = ["m", "recipe", *(["calib=calib"] if files.calib is not None else [])]
    options = {
        "generic": str(files.generic) if files.generic else None,
        "stats": str(files.stats) if files.stats else None,
        "format": None if files.format == "auto" else files.format,
    }
    if files.choose:
        evidence = str(evidence_folder(files.out)) if files.out else None
        chosen = {**options, "out": evidence}
        lines.append(python_call("qc.choose", arguments, chosen, result="choice"))
        arguments = ["m", "choice.recipe", "calib=choice.calibration", "choice=choice.record()"]
        options["generic"] = None
    options |= {"out": str(files.out) if files.out else None, "overwrite": files.overwrite or None}
    lines.append(python_call("qc.quantize", arguments, options, result="artifact"))
    return "\n".join(lines)
