"""Reading the numbers of a config.json: each checked, all complaints kept and told at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcore.errors import DtypeError, FormatError, QcoreError, escaped

# Larger than any model, small enough that products of two stay far from overflowing 64 bits.
LARGEST_SIZE = 1 << 24
MOST_TOLD = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its code, what is wrong, and where."""

    code: str
    text: str
    where: str = ""
    remedy: str = ""


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises one error that tells all problems and carries the code of the first; nothing if none.

    Raises:
        FormatError: with the code of the first problem.
        DtypeError: when the first problem is a DTYPE code.
    """
    if not problems:
        return
    first = problems[0]
    told = [
        problem.text if len({p.code for p in problems}) == 1 else f"{problem.code}: {problem.text}"
        for problem in problems[:MOST_TOLD]
    ]
    if len(problems) > MOST_TOLD:
        told.append(f"... and {len(problems) - MOST_TOLD} more.")
    remedies = dict.fromkeys(problem.remedy for problem in problems if problem.remedy)
    kind: type[QcoreError] = DtypeError if first.code.startswith("DTYPE") else FormatError
    raise kind(
        "\n".join(told),
        code=first.code,
        where=first.where if len(problems) == 1 else "",
        found=[problem.code for problem in problems],
        remedy=" ".join(remedies),
    )


@dataclass
class ConfigReader:
    """Typed access to one level of a config.

    A key that is absent takes the architecture's default, if it has one; a key that is null is
    "off" where that means something, otherwise it is treated as absent.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The value, or the default, or None; null counts as a value."""
        return self.values[key] if key in self.values else self.defaults.get(key)

    def complain(self, code: str, text: str, key: str = "") -> None:
        """Keeps a complaint, once; reading goes on."""
        problem = Problem(code, text, f"config.json: {key}" if key else "config.json")
        if problem not in self.problems:
            self.problems.append(problem)

    def size(self, key: str, fallback: int | None = None) -> int:
        """A whole number in [1, LARGEST_SIZE]; 1 after a complaint."""
        value = self.get(key)
        if value is None:
            value = fallback
        if value is None:
            self.complain("CONFIG_VALUE", f"{key} is missing.", key)
        elif isinstance(value, bool) or not isinstance(value, int):
            self.complain("CONFIG_VALUE", f"{key} is {_shown(value)}, not a whole number.", key)
        elif not 1 <= value <= LARGEST_SIZE:
            self.complain("CONFIG_VALUE", f"{key} is {value}, not in 1 ... {LARGEST_SIZE}.", key)
        else:
            return int(value)
        return 1

    def optional_size(self, key: str) -> int:
        """A size, or 0 when the key is absent or null."""
        return 0 if self.get(key) is None else self.size(key)

    def number(
        self, key: str, fallback: float | None = None, *, low: float = 0.0, name: str = ""
    ) -> float:
        """A finite number above `low`; 1.0 after a complaint."""
        value = self.get(key)
        if value is None:
            value = fallback
        name = name or key
        if value is None:
            self.complain("CONFIG_VALUE", f"{name} is missing.", name)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            self.complain("CONFIG_VALUE", f"{name} is {_shown(value)}, not a number.", name)
        elif isinstance(value, int) and abs(value) > LARGEST_SIZE**2:
            self.complain("CONFIG_VALUE", f"{name} is {_shown(value)}, too large.", name)
        elif not (math.isfinite(value) and value > low):
            self.complain("CONFIG_VALUE", f"{name} is {value}; it must be above {low:g}.", name)
        else:
            return float(value)
        return 1.0

    def optional_number(self, key: str) -> float:
        """A positive number, or 0 when the key is absent or null."""
        return 0.0 if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """True or false; absent and null are false unless the default says otherwise."""
        value = self.get(key)
        if value is None:
            return bool(self.defaults.get(key, False))
        if not isinstance(value, bool):
            self.complain("CONFIG_VALUE", f"{key} is {_shown(value)}, not true or false.", key)
            return False
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A JSON object; empty when absent or null."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.complain("CONFIG_VALUE", f"{key} is {_shown(value)}, not an object.", key)
            return {}
        return value

    def words(self, key: str, length: int, allowed: Sequence[str]) -> list[str] | None:
        """A list of `length` words out of `allowed`; None when absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(word not in allowed for word in value):
            wanted = ", ".join(allowed)
            self.complain("CONFIG_VALUE", f"{key} must be a list of: {wanted}.", key)
            return None
        if len(value) != length:
            text = f"{key} has {len(value)} entries and num_hidden_layers is {length}."
            self.complain("CONFIG_INCONSISTENT", text, key)
            return None
        return [str(word) for word in value]


def _shown(value: object) -> str:
    return escaped(repr(value), 60)
