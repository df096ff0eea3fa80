"""The table: every recipe by its name, and the papers that they come from."""

import fnmatch
from collections.abc import Iterable, Mapping
from functools import cache

from schemes import SchemeError

from ..names import closest
from . import convnext, densenet, ho_resnet, rdnet, resnet, revcol, revnet
from .recipe import Paper, Recipe

# One file per paper: another paper adds one word here.
FILES = (ho_resnet, revcol, rdnet, densenet, convnext, resnet, revnet)
PAPERS: tuple[Paper, ...] = tuple(file.PAPER for file in FILES)


@cache
def table() -> Mapping[str, Recipe]:
    """Returns all recipes by name, paper by paper.

    Raises:
        SchemeError: two recipes have the same name.
    """
    return joined(recipe for file in FILES for recipe in file.RECIPES)


def joined(recipes: Iterable[Recipe]) -> dict[str, Recipe]:
    """Returns recipes by name.

    Raises:
        SchemeError: two have the same name.
    """
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name in found:
            raise SchemeError(f"two recipes are named {recipe.name!r}; choose another name for one.")
        found[recipe.name] = recipe
    return found


def names(pattern: str = "*") -> list[str]:
    """Returns the names of the recipes, paper by paper.

    Args:
        pattern: a pattern with shell wildcards.

    Example:
        >>> from odenets import recipes
        >>> recipes.names("rdnet_?????")
        ['rdnet_small', 'rdnet_large']
    """
    return [name for name in table() if fnmatch.fnmatchcase(name, pattern)]


def find(name: str) -> Recipe:
    """Returns the recipe of this name.

    Raises:
        SchemeError: there is none; the closest names are listed.

    Example:
        >>> from odenets import recipes
        >>> recipes.find("convnext_tiny").line
        'ConvNeXt T, ImageNet-1K, train: 82.1 % top-1'
    """
    if name not in table():
        close = closest(name, table())
        hint = f"Closest: {', '.join(close)}. All" if close else "All"
        raise SchemeError(f"there is no recipe {name!r}\n  {hint}: odenets recipe --list")
    return table()[name]
