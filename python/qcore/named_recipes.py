"""Recipes that come with qcore, each a commented file to read, copy and change."""

from __future__ import annotations

from pathlib import Path

from qcore.errors import RecipeError, escaped

FOLDER = Path(__file__).with_name("assets") / "recipes"
NAMES = ("default", "best", "fast", "plain", "rtn")


def recipe_path(named: str | Path) -> Path:
    """The file of a recipe that comes with qcore, by its name; other paths as they are.

    Raises:
        RecipeError: neither such a name nor a file.
    """
    path = Path(named)
    if str(named) in NAMES:
        return FOLDER / f"{named}.toml"
    if not path.exists() and path.name == str(named) and not path.suffix:
        raise RecipeError(
            f"There is no recipe named {escaped(str(named))!r}, and no such file.",
            found=str(named),
            needed=NAMES,
            remedy=f"Name a file, or one of {', '.join(NAMES)}.",
        )
    return path
