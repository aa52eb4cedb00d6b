"""The main job: a checkpoint in, a verified artifact out, block by block (`block_pass`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qcore.block_pass import BlockPass
from qcore.errors import InternalError
from qcore.expert_coverage import coverage_warnings
from qcore.finite import require_finite
from qcore.formats import ArtifactWriter, Format
from qcore.job import Job, settle
from qcore.model import Artifact, Model, open_model
from qcore.progress import reporter
from qcore.recipe import Recipe, warn
from qcore.record import RunClock, artifact_record, calibration_record
from qcore.solve_block import SolvedBlock
from qcore.tuning import Tuning

T = TypeVar("T")

if TYPE_CHECKING:
    from qcore.assignment import Assignment
    from qcore.checkpoint.architectures import DecoderPlan
    from qcore.checkpoint.checkpoint import TensorRef
    from qcore.data.calibration import Calibration
    from qcore.stats import Stats

# Under this many effective tokens per input channel a Hessian is noisy: with n tokens in K channels
# the eigenvalues of pure noise spread over (1 ± sqrt(K / n))², here from a quarter to 2.25 (Marchenko
# and Pastur 1967).
ENOUGH_TOKENS_PER_FEATURE = 4.0


def quantize(
    model: Model | str | Path,
    recipe: Recipe | None = None,
    *,
    calib: Calibration | str | Path | Iterable[Any] | None = None,
    generic: Calibration | str | Path | Iterable[Any] | None = None,
    stats: Stats | str | Path | None = None,
    out: str | Path,
    choice: Mapping[str, Any] | None = None,
    format: str = "auto",
    overwrite: bool = False,
    progress: str | Callable[[Mapping[str, Any]], None] = "auto",
) -> Artifact:
    """Quantizes a checkpoint and writes an artifact that other runtimes load.

    Args:
        model: an open Model, or the path of a Hugging Face folder or GGUF file; only read.
        recipe: what to do; the default recipe when None.
        calib: a Calibration, or raw data to build one from. Needed by every method but "rtn".
        stats: a Stats or its file, in place of `calib`, for a recipe whose `propagate` is
            "reference" (the default recipe is taken so).
        generic: text of another domain, for a recipe with a `generic_share`.
        choice: what the recipe was chosen from (`Choice.record()`), kept in the record.
        out: the artifact's folder; must not exist unless `overwrite`.
        format: "auto" (awq for 4 bits asymmetric where the group size fits, gptq for symmetric,
            gptq_v2 otherwise), "gptq", "gptq_v2", "awq", "ct".
        overwrite: replace an existing artifact, in one step, when the new one is complete and
            verified.
        progress: "auto", "bar", "log", "json", "none", or a callable that takes each event.

    Returns:
        The opened artifact. `artifact.record["fallbacks"]` names layers that fell back to plain
        rounding.

    Raises:
        QcoreError: by code; nothing is written then. KeyboardInterrupt leaves nothing either.
    """
    clock = RunClock()
    opened = model if isinstance(model, Model) else open_model(model)
    known = _opened_stats(stats)
    if recipe is None:
        recipe = Recipe() if known is None else Recipe(propagate="reference")
    known_paths = [] if known is None or known.path is None else [known.path]
    # A destination that will be refused is refused before the calibration data is read.
    with ArtifactWriter(
        out,
        overwrite=overwrite,
        sources=[opened.path, *_data_paths(calib), *_data_paths(generic), *known_paths],
    ):
        pass
    with reporter(progress) as report:
        job = settle(opened, recipe, calib, format, report, generic, stats=known)
        data = known_paths if job.calibration is None else job.calibration.files
        with ArtifactWriter(out, overwrite=overwrite, sources=[opened.path, *data]) as writer:
            writer.plan(planned_tensors(job.model, job.assignment, job.format))
            clock.lap("prepare")
            record = _run(job, writer, clock, choice)
            for name, content in artifact_files(job).items():
                writer.add_file(name, content)
            writer.publish(record, clock.to_dict)
        fallbacks = record["fallbacks"]
        report({"event": "done", "out": str(out), "fallbacks": len(fallbacks)})
    if len(fallbacks) > job.recipe.allow_fallback:
        warn(
            f"{len(fallbacks)} layers fell back to plain rounding: {', '.join(fallbacks[:3])}"
            f"{' ...' if len(fallbacks) > 3 else ''}. Use more or other calibration data.",
            "HESSIAN_SINGULAR",
        )
    artifact = open_model(out)
    if not isinstance(artifact, Artifact):
        raise InternalError(f"{out} was written but does not open as an artifact.")
    return artifact


def _opened_stats(stats: Stats | str | Path | None) -> Stats | None:
    if not isinstance(stats, (str, Path)):
        return stats
    from qcore.stats import Stats

    return Stats.load(stats)


def _data_paths(calib: object) -> list[str | Path]:
    """The files of the calibration data, as far as they are known before it is read."""
    if isinstance(calib, (str, Path)):
        return [calib] if Path(calib).exists() else []
    return list(getattr(calib, "files", ()))


def _run(
    job: Job, writer: ArtifactWriter, clock: RunClock, choice: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The pass over the blocks; returns the record."""
    recipe = job.recipe
    # Before any work: a NaN here would come to light as one of the first block's activations, or
    # after the last block.
    for name, reference in _outside_blocks(job):
        require_finite(reference.array(), name)
    blocks = BlockPass(job, clock, scratch=writer.folder)
    layers: list[dict[str, Any]] = []
    folds: list[dict[str, Any]] = []
    for block, solved in blocks.blocks():
        _write_block(job, writer, block.plan.index, solved)
        layers += solved.reports
        folds += solved.folds
        clock.lap("write")
    tuned = {} if blocks.student is None else blocks.student.outside
    for name, reference in _outside_blocks(job):
        writer.write(name, tuned.get(name, reference.array()))
    clock.lap("write")
    return artifact_record(
        model=job.model,
        recipe=recipe,
        assignment=job.assignment,
        format_name=job.format.name,
        activations=job.activations,
        calibration=_data_record(job),
        layers=layers,
        folds=folds,
        sufficiency=blocks.enough,
        experts=[coverage.to_dict() for coverage in blocks.coverage],
        warnings=[
            *_ragged_warnings(job.assignment),
            *_thin_warnings(blocks.enough),
            *coverage_warnings(blocks.coverage),
            *_tuning_warnings(blocks.tuning),
        ],
        tuning=None if blocks.tuning is None else blocks.tuning.to_dict(),
        choice=choice,
    )


def _data_record(job: Job) -> dict[str, Any] | None:
    """What the record says of the data, None where none was used."""
    if job.stats is not None:
        return job.stats.record()
    if job.calibration is None or not job.recipe.needs_data:
        return None
    return calibration_record(job.calibration)


def _ragged_warnings(assignment: Assignment) -> list[dict[str, str]]:
    text = assignment.regrouped
    return [{"code": "GROUP_RAGGED", "message": text}] if text else []


def _tuning_warnings(tuning: Tuning | None) -> list[dict[str, str]]:
    return [] if tuning is None or tuning.warning is None else [tuning.warning]


def _thin_warnings(enough: Mapping[str, float]) -> list[dict[str, str]]:
    thin = {
        tap: ratio
        for tap, ratio in enough.items()
        if ratio < ENOUGH_TOKENS_PER_FEATURE and not tap.startswith("experts.")
    }
    if not thin:
        return []
    told = ", ".join(f"{tap} {ratio:.2g}" for tap, ratio in thin.items())
    text = (
        f"Few calibration tokens per input channel ({told}; "
        f"{ENOUGH_TOKENS_PER_FEATURE:g} is enough). Use more samples."
    )
    warn(text, "CALIB_THIN")
    return [{"code": "CALIB_THIN", "message": text}]


def planned_tensors(
    model: Model, assignment: Assignment, fmt: Format
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the artifact before any exists: name -> (dtype, shape), in the order of the
    model.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, reference in model.tensors.items():
        layer = name.removesuffix(".weight")
        spec = assignment.specs.get(layer) if name.endswith(".weight") else None
        if spec is None:
            tensors[name] = (reference.dtype, tuple(reference.shape))
            continue
        out_features, in_features = reference.shape
        for suffix, described in fmt.tensors(out_features, in_features, spec).items():
            tensors[f"{layer}.{suffix}"] = described
    return tensors


def _write_block(job: Job, writer: ArtifactWriter, index: int, solved: SolvedBlock) -> None:
    prefix = job.model.plan.blocks[index].prefix
    for name, reference in job.model.tensors.items():
        if not name.startswith(f"{prefix}."):
            continue
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in solved.layers:
            writer.write_layer(layer, solved.layers[layer], job.format)
        else:
            writer.write(name, solved.vectors.get(name, reference.array()))


def _outside_blocks(job: Job) -> Iterator[tuple[str, TensorRef]]:
    """Embedding, final norm and head."""
    prefixes = tuple(f"{block.prefix}." for block in job.model.plan.blocks)
    for name, reference in job.model.tensors.items():
        if not name.startswith(prefixes):
            yield name, reference


def with_fused_experts(plan: DecoderPlan, named: Mapping[str, T]) -> dict[str, T]:
    """The names, and "....experts" wherever the layers of all experts of a block have one value.

    Runtimes fuse a block's experts into one module, and look for it under that name.
    """
    found = dict(named)
    for block in plan.blocks:
        layers = [linear.name for linear in block.linears if linear.expert is not None]
        if block.experts is None or any(name not in named for name in layers):
            continue
        if all(named[name] == named[layers[0]] for name in layers):
            found[f"{block.experts.part}.experts"] = named[layers[0]]
    return found


def artifact_files(job: Job) -> dict[str, bytes | Path]:
    """config.json with the runtime's quantization_config, and all that is carried over byte for
    byte.
    """
    kept = job.assignment.kept
    configured = job.format.config_files(
        job.model.checkpoint.config,
        default=job.assignment.default,
        exceptions=with_fused_experts(job.model.plan, job.assignment.exceptions),
        kept=[*with_fused_experts(job.model.plan, dict.fromkeys(kept)), *job.model.plan.routers],
        damp_ratio=job.recipe.damp_ratio,
    )
    carried = {
        name: content
        for name, content in job.model.checkpoint.carry.items()
        if name not in configured
    }
    return {**carried, **configured}
