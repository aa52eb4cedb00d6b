"""qcore inspect: what is in a checkpoint or an artifact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcore.cli.shared import Shared, count_of, shared_options, size, table

if TYPE_CHECKING:
    from qcore.model import Model

# What a reader of a config looks for first; the whole of it is in --json.
CONFIG_KEYS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings"),
    *("tie_word_embeddings", "rope_theta", "sliding_window"),
)


@click.command(
    "inspect",
    short_help="Sizes by layer, bits per weight, config, record.",
    epilog="Example: qcore inspect ./support-8b-w4 --tensors",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="Every tensor: dtype, shape, bytes.")
@shared_options()
def command(shared: Shared, /, path: Path, tensors: bool) -> None:
    """Sizes by layer, bits per weight, config and record of the model at PATH."""
    if shared.print_python:
        text = f"import qcore as qc\n\nqc.open({str(path)!r})"
        shared.result({"python": text}, text.splitlines())
        return
    import qcore

    model = qcore.open(path)
    data = described(model)
    if tensors:
        data["tensors"] = [
            {"name": n, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
            for n, t in model.tensors.items()
        ]
    shared.result(data, lines_of(model, data, layers=shared.verbose > 0))


def described(model: Model) -> dict[str, Any]:
    """The whole answer, ready for JSON."""
    layers = layer_sizes(model)
    groups = group_sizes(model, layers)
    record = getattr(model, "record", None)
    weights = sum(group["weights"] for group in groups)
    return {
        "path": str(model.path),
        "kind": "artifact" if record else "checkpoint",
        "bytes": model.bytes,
        "weights": weights,
        "bits_per_weight": _ratio(8 * model.bytes, weights),
        "layers": layers,
        "groups": groups,
        "config": dict(model.config),
        "record": record,
        "digest": getattr(model, "digest", None),
    }


def layer_sizes(model: Model) -> list[dict[str, Any]]:
    """One row for each linear layer: all its tensors together, whatever the format calls them."""
    held: dict[str, int] = {}
    for name, tensor in model.tensors.items():
        layer = name.rpartition(".")[0]
        held[layer] = held.get(layer, 0) + tensor.nbytes
    losses = {
        layer["layer"]: layer.get("loss")
        for layer in (getattr(model, "record", None) or {}).get("layers", [])
    }
    rows = []
    for linear in model.plan.linears:
        weights = linear.out_features * linear.in_features
        rows.append(
            {
                "name": linear.name,
                "shape": [linear.out_features, linear.in_features],
                "bytes": held.get(linear.name, 0),
                "bits_per_weight": _ratio(8 * held.get(linear.name, 0), weights),
                "loss": losses.get(linear.name),
            }
        )
    return rows


def group_sizes(model: Model, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks, and what lies outside them, in the order of the model."""
    groups: dict[str, dict[str, Any]] = {}
    linears = {layer["name"] for layer in layers}
    prefixes = [block.prefix for block in model.plan.blocks]
    for name, tensor in model.tensors.items():
        layer = name.rpartition(".")[0]
        group = next((p for p in prefixes if name.startswith(f"{p}.")), layer or name)
        row = groups.setdefault(group, {"name": group, "weights": 0, "bytes": 0})
        row["bytes"] += tensor.nbytes
        if layer not in linears:
            row["weights"] += math.prod(tensor.shape)
    for linear in layers:
        group = next(p for p in prefixes if linear["name"].startswith(f"{p}."))
        groups[group]["weights"] += math.prod(linear["shape"])
    for row in groups.values():
        row["bits_per_weight"] = _ratio(8 * row["bytes"], row["weights"])
    return list(groups.values())


def _ratio(bits: float, weights: int) -> float | None:
    return round(bits / weights, 4) if weights else None


def lines_of(model: Model, data: dict[str, Any], *, layers: bool) -> list[str]:
    """The answer for people."""
    config = [f"{key} {data['config'][key]}" for key in CONFIG_KEYS if key in data["config"]]
    lines = [repr(model), *(f"  {line}" for line in _wrapped(config)), ""]
    rows = [("part", "weights", "bytes", "bits/weight", "loss")]
    losses = {layer["name"]: layer["loss"] for layer in data["layers"]}
    for group in data["groups"]:
        known = [
            x for n, x in losses.items() if n.startswith(f"{group['name']}.") and x is not None
        ]
        rows.append(_row(group, max(known, default=None)))
        if layers:
            rows += [
                _row({**layer, "name": f"  {layer['name']}", "weights": math.prod(layer["shape"])},
                     layer["loss"])
                for layer in data["layers"]
                if layer["name"].startswith(f"{group['name']}.")
            ]  # fmt: skip
    rows.append(_row({**data, "name": "all"}, None))
    with_losses = any(row[4] for row in rows[1:])
    lines += table([row if with_losses else row[:4] for row in rows], right=(1, 2, 3, 4))
    if data["record"]:
        lines += ["", *record_lines(data)]
    if "tensors" in data:
        shown = [
            (t["name"], t["dtype"], "x".join(map(str, t["shape"])) or "scalar", f"{t['bytes']:,}")
            for t in data["tensors"]
        ]
        lines += ["", *table([("tensor", "dtype", "shape", "bytes"), *shown], right=(2, 3))]
    return lines


def _row(part: dict[str, Any], loss: float | None) -> tuple[str, str, str, str, str]:
    bits = part["bits_per_weight"]
    return (
        part["name"],
        count_of(part["weights"]),
        size(part["bytes"]),
        "" if bits is None else f"{bits:.3f}",
        "" if loss is None else f"{loss:.2e}",
    )


def record_lines(data: dict[str, Any]) -> list[str]:
    """The record's settings, one a line; its layers are in the table above, all of it in --json."""
    lines = [f"record       {data['digest']}"]
    for key, value in data["record"].items():
        if isinstance(value, dict):
            told = ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in value.items()
                if v and not isinstance(v, dict | list)
            )
        else:
            told = str(len(value)) if isinstance(value, list) else str(value or "")
        if told and key != "digest":
            lines.append(f"  {key:<24} {told}")
    return lines


def _wrapped(parts: list[str], per_line: int = 4) -> list[str]:
    return [", ".join(parts[i : i + per_line]) for i in range(0, len(parts), per_line)]
