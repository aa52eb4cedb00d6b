"""Statistics of blocks with experts: how many calibration tokens each expert was given, and what is
done about those that were given too few (`Recipe.experts`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcore.calibrate import Stream, advance, collect, collect_every_token
from qcore.errors import CalibrationError
from qcore.recipe import warn

if TYPE_CHECKING:
    from qcore import _core
    from qcore.checkpoint.architectures import BlockPlan
    from qcore.layers import Hessian
    from qcore.model import Block
    from qcore.recipe import Recipe

# Under this many tokens an expert's statistics say nothing of it; under so many effective tokens per
# channel pure noise spreads the Hessian's eigenvalues from a twelfth to three times their size.
FEWEST_TOKENS = 64
ENOUGH_TOKENS_PER_CHANNEL = 2.0
_MOST_NAMED = 8


@dataclass(frozen=True)
class ExpertCoverage:
    """What the experts of one block were given.

    Attributes:
        name: "model.layers.0.mlp.experts".
        tokens: calibration tokens that the router gave to each expert.
        ratios: effective tokens per channel in each expert's statistics, as they were used, of its
            wider input; 0 when it has none.
        kept: experts of which no layer is quantized.
        every_token: experts whose statistics were taken from all tokens.
        rounded: experts that are rounded plainly.
    """

    name: str
    tokens: tuple[int, ...]
    ratios: tuple[float, ...]
    kept: tuple[int, ...]
    every_token: tuple[int, ...]
    rounded: tuple[int, ...]

    @property
    def thin(self) -> tuple[int, ...]:
        """Experts quantized with statistics of fewer than ENOUGH_TOKENS_PER_CHANNEL."""
        return tuple(
            expert
            for expert, ratio in enumerate(self.ratios)
            if ratio < ENOUGH_TOKENS_PER_CHANNEL and expert not in (*self.rounded, *self.kept)
        )

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "name": self.name,
            "tokens": list(self.tokens),
            "tokens_per_channel": list(self.ratios),
            "every_token": list(self.every_token),
            "rounded": list(self.rounded),
        }


def collect_with_experts(
    block: Block,
    stream: Stream,
    recipe: Recipe,
    activations: str,
    *,
    advance_stream: bool,
    quantized: Collection[str],
    moments: Mapping[str, _core.CrossMoment] | None = None,
) -> tuple[dict[str, Hessian], ExpertCoverage | None]:
    """`collect`, and the recipe's way with experts that too few tokens reach.

    Args:
        block, stream, activations, moments: as for `collect`.
        recipe: its `experts` says what happens to experts under FEWEST_TOKENS.
        advance_stream: as `advance` of `collect`.
        quantized: names of the layers that are quantized; experts without one need no tokens.

    Returns:
        tap -> statistics, without those of experts that are to be rounded; None for a block
        without experts.

    Raises:
        CalibrationError: EXPERT_UNCALIBRATED under "strict", with the experts and their tokens.
    """
    plan = block.plan.experts
    again = plan is not None and recipe.experts == "all"
    hessians = collect(
        block, stream, activations, advance=advance_stream and not again, moments=moments
    )
    if plan is None:
        return hessians, None
    tokens, starved = _starved(block.plan, hessians, recipe, quantized)
    if starved and recipe.experts == "all":
        hessians |= collect_every_token(block, stream, activations, starved)
        hessians |= {plan.input_tap(e): hessians["mlp_input"] for e in starved}
    if again and advance_stream:
        advance(block, stream, activations)
    return hessians, _coverage(block.plan, hessians, tokens, starved, recipe, quantized)


def known_coverage(
    plan: BlockPlan,
    hessians: dict[str, Hessian],
    recipe: Recipe,
    quantized: Collection[str],
) -> ExpertCoverage | None:
    """The recipe's way with experts of a block whose statistics are known: "strict" or "rtn".

    Statistics of experts that are to be rounded are taken out of `hessians`. The rest is as for
    `collect_with_experts`.
    """
    if plan.experts is None:
        return None
    tokens, starved = _starved(plan, hessians, recipe, quantized)
    return _coverage(plan, hessians, tokens, starved, recipe, quantized)


def _wanted(plan: BlockPlan, quantized: Collection[str]) -> set[int | None]:
    """Experts of which a layer is quantized."""
    return {x.expert for x in plan.linears if x.name in quantized} - {None}


def _starved(
    plan: BlockPlan,
    hessians: Mapping[str, Hessian],
    recipe: Recipe,
    quantized: Collection[str],
) -> tuple[tuple[int, ...], list[int]]:
    """Tokens of every expert; the experts that were given too few."""
    experts = plan.experts
    assert experts is not None
    wanted = _wanted(plan, quantized)
    tokens = tuple(hessians[experts.input_tap(e)].n_tokens for e in range(experts.n_experts))
    starved = [e for e in range(experts.n_experts) if e in wanted and tokens[e] < FEWEST_TOKENS]
    if starved and recipe.experts == "strict":
        raise _uncalibrated(f"{experts.part}.experts", starved, tokens)
    return tokens, starved


def _coverage(
    plan: BlockPlan,
    hessians: dict[str, Hessian],
    tokens: tuple[int, ...],
    starved: list[int],
    recipe: Recipe,
    quantized: Collection[str],
) -> ExpertCoverage:
    """The account; takes the statistics of experts that are to be rounded out of `hessians`."""
    experts = plan.experts
    assert experts is not None
    ratios = tuple(
        min(hessians[tap].ratio for tap in (experts.input_tap(e), experts.hidden_tap(e)))
        for e in range(experts.n_experts)
    )
    rounded = starved if recipe.experts == "rtn" else []
    for expert in rounded:
        del hessians[experts.input_tap(expert)], hessians[experts.hidden_tap(expert)]
    wanted = _wanted(plan, quantized)
    return ExpertCoverage(
        name=f"{experts.part}.experts",
        tokens=tokens,
        ratios=ratios,
        kept=tuple(e for e in range(experts.n_experts) if e not in wanted),
        every_token=tuple(starved) if recipe.experts == "all" else (),
        rounded=tuple(rounded),
    )


def coverage_warnings(coverage: Sequence[ExpertCoverage]) -> list[dict[str, str]]:
    """Warns of experts with few tokens; the same for the record."""
    few = f"fewer than {FEWEST_TOKENS} calibration tokens"
    thin = f"fewer than {ENOUGH_TOKENS_PER_CHANNEL:g} calibration tokens per input channel"
    rounded = [f"{c.name}.{e} ({c.tokens[e]})" for c in coverage for e in c.rounded]
    routed = [f"{c.name}.{e} ({c.tokens[e]})" for c in coverage for e in c.every_token]
    starved = [f"{c.name}.{e} ({c.ratios[e]:.2g})" for c in coverage for e in c.thin]
    told = [
        (code, f"{_counted(names)} with {what}: {_named(names)}. Use more samples.")
        for code, names, what in (
            ("EXPERT_UNCALIBRATED", rounded, f"{few} rounded plainly"),
            ("CALIB_THIN", routed, f"{few} quantized with the statistics of all tokens"),
            ("CALIB_THIN", starved, thin),
        )
        if names
    ]
    for code, text in told:
        warn(text, code)
    return [{"code": code, "message": text} for code, text in told]


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} expert" if len(names) == 1 else f"{len(names)} experts"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"


def _uncalibrated(name: str, starved: Sequence[int], tokens: Sequence[int]) -> CalibrationError:
    told = _named([f"{expert} ({tokens[expert]})" for expert in starved])
    return CalibrationError(
        f"{name}: of {len(tokens)} experts {len(starved)} saw fewer than {FEWEST_TOKENS} calibration "
        f"tokens: {told}.",
        code="EXPERT_UNCALIBRATED",
        where=name,
        found={expert: tokens[expert] for expert in starved},
        needed=FEWEST_TOKENS,
        remedy="Use more or other samples, --experts all (statistics of all tokens for these "
        "experts) or --experts rtn (plain rounding of them).",
    )
