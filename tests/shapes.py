"""The shapes that probekit's annotations promise hold in every call that a test makes in its own process.

jaxtyping's import hook wraps every function of the package. Plain beartype would check all annotations, and fail on those
that only a type checker can resolve: `checked` leaves it those with shapes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook


def shaped(hint: Any) -> bool:
    """Whether an array with a shape is somewhere in it."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    # the arguments of a Callable are a list
    return any(map(shaped, hint if isinstance(hint, list) else get_args(hint)))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its shapes checked; jaxtyping has made Any of the annotations that it could not evaluate."""
    shapes = {name: hint for name, hint in function.__annotations__.items() if shaped(hint)}
    if not shapes:
        return function
    function.__annotations__ = shapes
    return beartype(function)


class _EveryFinder:
    """An installation for development finds probekit.hooks by a finder of its own, which the import hook would not ask."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        others = (finder for finder in sys.meta_path if finder is not hook)
        found = (finder.find_spec(name, path, target) for finder in others)
        return next((spec for spec in found if spec is not None), None)


assert "probekit" not in sys.modules, "probekit was imported before its shapes could be checked"
hook = install_import_hook("probekit", "tests.shapes.checked").hook
hook._original_pathfinder = _EveryFinder()
