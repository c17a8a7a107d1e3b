"""Papers: one file each, with what is only that paper's and its `RECIPES`, a dict of name -> Recipe.

A recipe is called `<paper>.<name>`, such as `qsd_transformer.cifar10_small`.
"""
from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitspike.recipe import Recipe

#: the claim of a recipe whose result is in no text that could be had
NO_CLAIM = "none published that could be consulted"


def train_command(recipe: str, more: str = "") -> str:
    """The command that trains a recipe of that full name, to stand at the end of its `cost`.

    >>> train_command("demo.float", " --set epochs=2")
    'bitspike train demo.float --data DIR --out RUN --set epochs=2'
    """
    return f"bitspike train {recipe} --data DIR --out RUN{more}"


def all_recipes() -> dict[str, Recipe]:
    """Full name -> recipe, of every paper here; imports them all."""
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        paper = importlib.import_module(f"{__name__}.{module.name}")
        for name, recipe in getattr(paper, "RECIPES", {}).items():
            found[name if "." in name else f"{module.name}.{name}"] = recipe
    return found


def find_recipe(name: str) -> Recipe:
    """The recipe of that full name. Errors: RecipeError naming the nearest one."""
    from bitspike.recipe import RecipeError

    known = all_recipes()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, list(known), 1, 0.4)
    hint = f" (nearest: {close[0]!r})" if close else ""
    raise RecipeError(f"no recipe {name!r}{hint}; there are {len(known)}. List them with 'bitspike recipes'.")
