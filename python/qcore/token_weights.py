"""How much each calibration token counts in the statistics of each input.

A layer's Hessian with token weights ω is Σ_t ω_t x_t x_tᵀ. With ω_t = |δ_t|², the squared norm of
the gradient at the layer's output (`gradient_norms`), it is the Kronecker-factored Fisher
information of the layer's weights but for the factor on the output side (Martens and Grosse 2015,
arXiv 1503.05671): what quantization should keep small is the change in what the model says, and
tokens on which nothing later depends do not enter it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from qcore.backward_pass import gradient_norms
from qcore.errors import RecipeError, escaped
from qcore.prefix_mass import limited, shared_tokens
from qcore.recipe import Recipe, warn
from qcore.spec import Array, Float32Array, Float64Array

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import BlockPlan
    from qcore.model import Model

# (block, tap) -> (n_tokens,) float32.
TokenWeights: TypeAlias = Mapping[tuple[int, str], Float32Array]


def token_weights(
    model: Model, sequences: Sequence[Array], recipe: Recipe, activations: str
) -> TokenWeights | None:
    """The weight of each token, by the recipe, for each input of the model's layers; None: all 1.

    Under "first-tokens" position 0 of every sample counts `first_token_weight` times: attention
    rests on it, and its error reaches every later token (docs/algorithms/gptq.md). Beginnings that
    many samples share are limited to `prefix_mass` of the weight.

    Raises:
        RecipeError: RECIPE_CONFLICT, as `require_gradients`.
    """
    require_gradients(model, recipe)
    rule = settled(model, recipe).token_weights
    found: TokenWeights | None = None
    if rule == "fisher":
        found = fisher_weights(model, sequences, recipe, activations)
    elif rule == "first-tokens" or recipe.prefix_mass < 1.0:
        lengths = [len(tokens) for tokens in sequences]
        weights = np.ones(sum(lengths), np.float32)
        if rule == "first-tokens":
            weights[np.cumsum((0, *lengths[:-1]))] = recipe.first_token_weight
        taps = ((block.index, tap) for block in model.plan.blocks for tap in taps_of(block))
        found = dict.fromkeys(taps, weights)
    if found is None or recipe.prefix_mass == 1.0:
        return found
    shared = shared_tokens(sequences)
    return {tap: limited(weights, shared, recipe.prefix_mass) for tap, weights in found.items()}


def settled(model: Model, recipe: Recipe) -> Recipe:
    """The recipe as the model allows it: `token_weights` "auto" resolved, and no tuning where there
    are experts, with a warning (TUNING_LEFT_OUT).
    """
    experts = any(block.experts is not None for block in model.plan.blocks)
    if experts and recipe.tuning_epochs:
        warn(
            f"{escaped(model.path.name, 80)} has experts, and gradients go through dense models only: "
            "no scale or norm is tuned.",
            "TUNING_LEFT_OUT",
        )
        recipe = recipe.with_(tuning_epochs=0)
    if recipe.token_weights != "auto":
        return recipe
    return recipe.with_(token_weights="first-tokens" if experts else "fisher")


def require_gradients(model: Model, recipe: Recipe) -> None:
    """Refuses "fisher" for a model that gradients do not go through (RECIPE_CONFLICT)."""
    if recipe.token_weights != "fisher":
        return
    for block in model.plan.blocks:
        if block.experts is not None:
            raise RecipeError(
                f'token_weights = "fisher" takes gradients, and {block.prefix} has experts.',
                code="RECIPE_CONFLICT",
                where=str(model.path),
                remedy='Use token_weights = "first-tokens".',
            )


def taps_of(block: BlockPlan) -> list[str]:
    """The inputs of a block's layers, each once; with experts also that of their router."""
    taps = [linear.tap for linear in block.linears]
    return list(dict.fromkeys(taps if block.experts is None else [*taps, "mlp_input"]))


def fisher_weights(
    model: Model, sequences: Sequence[Array], recipe: Recipe, activations: str
) -> TokenWeights:
    """Weights of all tokens for each input of the model's layers.

    Gradients are taken over about `fisher_tokens` tokens: whole samples, spread evenly. Each
    layer's norms are divided by their mean, and the layers that read an input share the mean of
    theirs. No token counts more than `fisher_clip` times the mean, and the share `fisher_even` of
    the weight is spread evenly. The other tokens get the mean weight of their position (positions
    0, 1-2, 3-6, 7-14, ... together).
    """
    chosen = spread(len(sequences), [len(s) for s in sequences], recipe.fisher_tokens)
    norms = gradient_norms(
        model, [sequences[i] for i in chosen], activations=activations, seed=recipe.seed
    )
    octaves = [octaves_of(len(tokens)) for tokens in sequences]
    of_chosen = np.concatenate([octaves[i] for i in chosen])
    known = np.concatenate(
        [np.full(len(tokens), i in set(chosen)) for i, tokens in enumerate(sequences)]
    )
    of_all = np.concatenate(octaves)
    weights: dict[tuple[int, str], Float32Array] = {}
    for block in model.plan.blocks:
        readers: dict[str, list[Float64Array]] = {}
        for linear in block.linears:
            readers.setdefault(linear.tap, []).append(normalized(norms[linear.name]))
        for tap, layers in readers.items():
            shared = np.mean(layers, axis=0)
            shared = normalized(np.minimum(shared, recipe.fisher_clip))
            shared = (1 - recipe.fisher_even) * shared + recipe.fisher_even
            row = mean_by_octave(shared, of_chosen, int(of_all.max()) + 1)[of_all]
            row[known] = shared
            weights[block.index, tap] = row.astype(np.float32)
    return weights


def normalized(values: Float64Array) -> Float64Array:
    """Divided by their mean; all 1 where that is 0."""
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)


def spread(count: int, lengths: Sequence[int], n_tokens: int) -> list[int]:
    """Samples spread evenly over all `count`, of about `n_tokens` tokens together."""
    share = min(1.0, n_tokens / max(1, sum(lengths)))
    wanted = max(1, round(share * count))
    return [i * count // wanted for i in range(wanted)]


def octaves_of(length: int) -> Array:
    """floor(log2(position + 1)) of each position."""
    return np.log2(np.arange(1, length + 1)).astype(np.int64)


def mean_by_octave(weights: Float64Array, octaves: Array, count: int) -> Float64Array:
    """The mean weight of each octave; that of the last one seen for those never seen."""
    sums = np.bincount(octaves, weights, minlength=count)
    counts = np.bincount(octaves, minlength=count)
    means = sums / np.maximum(counts, 1)
    seen = np.flatnonzero(counts)
    means[counts == 0] = means[seen[-1]]
    return means
