"""What `sensitivity` found: for each layer and width what it costs, as numbers, table, figures, file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcore.cards import Card, Svg, Table, format_number, heat_map_svg, html_card, lines_svg
from qcore.errors import ArgumentError, RecipeError, escaped
from qcore.mixed_precision.schemes import EXPERTS, Scheme, Unit, schemes_of
from qcore.recipe import Recipe

if TYPE_CHECKING:
    from qcore.mixed_precision.mixture import Mix

SENSITIVITY_VERSION = 1
# Best first.
ESTIMATES = ("kld", "fisher", "loss")
PLOTS = ("bits", "map")
_SHOWN_LAYERS = 12
ESTIMATE_NAMES = {"kld": "KL", "fisher": "predicted KL", "loss": "layer loss"}


@dataclass(frozen=True)
class Damage:
    """What one unit at one width does to the model.

    Attributes:
        kld: mean KL(original || model with only this changed), nats per token, held-out text.
        kld_se: its standard error over samples.
        fisher: the same KL as a backward pass predicts it (`mixed_precision.fisher`).
        loss: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), summed over the unit's layers.
    """

    kld: float | None
    kld_se: float | None
    fisher: float | None
    loss: float


@dataclass(frozen=True, eq=False)
class Measured:
    """One unit and its damage at each width.

    Attributes:
        unit: a layer, or layers that share a width.
        shapes: (out_features, in_features) of its layers.
        damage: by scheme.
    """

    unit: Unit
    shapes: tuple[tuple[int, int], ...]
    damage: Mapping[Scheme, Damage]

    @property
    def n_weights(self) -> int:
        """Weights of all its layers."""
        return sum(rows * columns for rows, columns in self.shapes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            **asdict(self.unit),
            "shapes": self.shapes,
            "damage": {str(scheme): asdict(d) for scheme, d in self.damage.items()},
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], schemes: Sequence[Scheme]) -> Measured:
        """What `to_dict` gave; KeyError, TypeError or ValueError for something else."""
        unit = Unit(entry["name"], int(entry["block"]), entry["role"], tuple(entry["layers"]))
        return cls(
            unit,
            tuple((int(rows), int(columns)) for rows, columns in entry["shapes"]),
            {scheme: _damage(entry["damage"][str(scheme)]) for scheme in schemes},
        )


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Damage per layer and width, in a model that is otherwise the original.

    Attributes:
        model, path: the original's name and where it was.
        recipe: how codes were chosen.
        group_size: of the schemes without one of their own.
        schemes: what was tried, narrowest first.
        measured: layers, and units that runtimes fuse, in the order of the model.
        data: hash and size of the calibration set, and how many of its tokens were held out for KL
            and used for the Fisher estimate.
    """

    model: str
    path: str
    recipe: Recipe
    group_size: int
    schemes: tuple[Scheme, ...]
    measured: tuple[Measured, ...]
    data: Mapping[str, Any]

    @property
    def estimates(self) -> tuple[str, ...]:
        """The estimates that are there for every unit, best first."""
        damages = [d for m in self.measured for d in m.damage.values()]
        return tuple(by for by in ESTIMATES if all(getattr(d, by) is not None for d in damages))

    @property
    def layers(self) -> tuple[Measured, ...]:
        """Single layers, and the experts of a block, which are measured only together."""
        return tuple(m for m in self.measured if len(m.unit.layers) == 1 or m.unit.role == EXPERTS)

    @property
    def per_layer(self) -> dict[str, dict[str, Damage]]:
        """Layer -> width -> damage."""
        return {m.unit.name: {str(s): d for s, d in m.damage.items()} for m in self.layers}

    @property
    def curve(self) -> dict[str, float]:
        """Width -> what all layers at that width cost if damages add up (they do not quite)."""
        by = self.estimates[0]
        return {str(s): sum(getattr(m.damage[s], by) for m in self.layers) for s in self.schemes}

    def unit(self, name: str) -> Measured | None:
        """What was measured under that name."""
        return next((m for m in self.measured if m.unit.name == name), None)

    def mix(self, **options: Any) -> Mix:
        """`qcore.mix` of the model that was measured; see there for the options."""
        from qcore.mixed_precision.mixture import mix

        return mix(self.path, self, **options)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "version": SENSITIVITY_VERSION,
            "model": self.model,
            "path": self.path,
            "recipe": {k: v for k, v in self.recipe.to_dict().items() if v is not None},
            "group_size": self.group_size,
            "bits": [str(scheme) for scheme in self.schemes],
            "data": dict(self.data),
            "units": [m.to_dict() for m in self.measured],
        }

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Reads what `save` wrote.

        Raises:
            RecipeError: no such file, or something else is in it.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise _unreadable(path, str(error.strerror)) from error
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, "it is no JSON") from error
        if not isinstance(data, dict) or data.get("version") != SENSITIVITY_VERSION:
            raise _unreadable(path, f"it has no version {SENSITIVITY_VERSION}")
        try:
            return cls._from_dict(data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _unreadable(path, f"{type(error).__name__}: {escaped(str(error))}") from error

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        schemes = schemes_of(data["bits"])
        measured = tuple(Measured.from_dict(entry, schemes) for entry in data["units"])
        if not measured:
            raise ValueError("it has no units")
        return cls(
            model=str(data["model"]),
            path=str(data["path"]),
            recipe=Recipe.from_dict(data["recipe"]),
            group_size=int(data["group_size"]),
            schemes=schemes,
            measured=measured,
            data=dict(data["data"]),
        )

    def frame(self) -> dict[str, npt.NDArray[Any]]:
        """Columns for pandas or polars: one row per layer and width."""
        rows = [(m, s, d) for m in self.layers for s, d in m.damage.items()]
        columns: dict[str, npt.NDArray[Any]] = {
            "layer": np.array([m.unit.name for m, _, _ in rows]),
            "block": np.array([m.unit.block for m, _, _ in rows]),
            "role": np.array([m.unit.role for m, _, _ in rows]),
            "bits": np.array([str(s) for _, s, _ in rows]),
            "weights": np.array([m.n_weights for m, _, _ in rows]),
        }
        for by in (*self.estimates, "kld_se"):
            values = [getattr(d, by) for _, _, d in rows]
            columns[by] = np.array(values, dtype=np.float64)
        return columns

    def plot(self, kind: str = "bits", bits: object = None) -> Svg:
        """A figure.

        Args:
            kind: "bits", damage against bits, the mean over blocks for each kind of layer; "map", the
                damage of every layer at one width, kinds of layers by blocks.
            bits: the width of the map; the narrowest when None.
        """
        if kind not in PLOTS:
            raise ArgumentError(
                f"There is no plot {kind!r}.",
                found=kind,
                needed=PLOTS,
                remedy=f"Use one of {', '.join(PLOTS)}.",
            )
        by = self.estimates[0]
        name = ESTIMATE_NAMES[by]
        roles = dict.fromkeys(m.unit.role for m in self.layers)
        if kind == "bits":
            return lines_svg(
                {
                    role: (
                        [scheme.bits for scheme in self.schemes],
                        [self._mean(role, scheme, by) for scheme in self.schemes],
                    )
                    for role in roles
                },
                title=f"{name} of one layer alone, mean over the blocks, logarithmic",
                x_label="bits",
                log_y=True,
            )
        scheme = self.schemes[0] if bits is None else self._known(bits)
        blocks = 1 + max(m.unit.block for m in self.layers)
        values = np.full((len(roles), blocks), np.nan)
        for m in self.layers:
            values[list(roles).index(m.unit.role), m.unit.block] = getattr(m.damage[scheme], by)
        return heat_map_svg(
            values,
            rows=list(roles),
            title=f"{name} of each layer alone at {scheme} bits",
            x_label="block",
        )

    def _mean(self, role: str, scheme: Scheme, by: str) -> float:
        values = [getattr(m.damage[scheme], by) for m in self.layers if m.unit.role == role]
        return float(np.mean(values))

    def _known(self, bits: object) -> Scheme:
        scheme = Scheme.of(bits)
        if scheme not in self.schemes:
            known = ", ".join(map(str, self.schemes))
            raise ArgumentError(
                f"{scheme} bits were not measured.",
                found=bits,
                needed=known,
                remedy=f"Use {known}.",
            )
        return scheme

    def _heads(self) -> tuple[str, ...]:
        name = ESTIMATE_NAMES[self.estimates[0]]
        return ("layer", "weights", *(f"{name} at {scheme}" for scheme in self.schemes))

    def _rows(self) -> list[tuple[object, ...]]:
        """Layers, the most damaged at the narrowest width first."""
        by, narrowest = self.estimates[0], self.schemes[0]
        worst = sorted(self.layers, key=lambda m: -getattr(m.damage[narrowest], by))
        return [
            (m.unit.name, m.n_weights, *(getattr(m.damage[s], by) for s in self.schemes))
            for m in worst
        ]

    def __str__(self) -> str:
        shown = [self._heads()]
        shown += [tuple(map(format_number, row)) for row in self._rows()[:_SHOWN_LAYERS]]
        totals = (format_number(total) for total in self.curve.values())
        shown.append((f"sum of {len(self.layers)} layers", "", *totals))
        widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in shown
        )

    def __repr__(self) -> str:
        widths = ", ".join(map(str, self.schemes))
        worst = self._rows()[0]
        return (
            f"Sensitivity({escaped(self.model, 80)}: {len(self.layers)} layers at {widths} bits by "
            f"{', '.join(self.estimates)}; most fragile {worst[0]})"
        )

    def _repr_html_(self) -> str:
        return html_card(
            Card(
                f"Sensitivity of {self.model}",
                repr(self),
                facts={"recipe": self.recipe.explain(), **self.data},
                tables=[Table(self._heads(), self._rows(), "Most fragile layers")],
                figures=[self.plot("bits"), self.plot("map")],
            )
        )


def _damage(values: Mapping[str, Any]) -> Damage:
    checked: dict[str, Any] = {n: None if v is None else float(v) for n, v in values.items()}
    return Damage(**{**checked, "loss": float(values["loss"])})


def _unreadable(path: Path, why: str) -> RecipeError:
    return RecipeError(
        f"{escaped(str(path))} is no result of qcore sensitivity: {why}.",
        where=escaped(str(path)),
        remedy="Make it with: qcore sensitivity MODEL --calib chats.jsonl -o FILE.",
    )
