"""Every call that the tests make is checked against the shapes in probekit's annotations: see tests/shapes.py."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from probekit import hooks
from probekit.latents.space import LatentSpace
from probekit.metrics.distributions import frechet
from probekit.metrics.lpips import distances
from probekit.models.families.glow import ActNorm
from tests import shapes


def modules() -> Iterator[ModuleType]:
    for name in ("probekit", "probekit.hooks", "probekit.experiments"):
        package = importlib.import_module(name)
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            yield importlib.import_module(found.name)


def functions(module: ModuleType) -> Iterator[Any]:
    classes = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    for owner in (module, *classes):
        for value in vars(owner).values():
            function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                yield function


def test_every_module_is_imported_through_the_hook_and_no_shape_is_lost_on_the_way() -> None:
    """As one would be whose names are imported for type checkers alone."""
    known = 0
    for module in modules():
        assert type(module.__loader__).__name__ == "_JaxtypingLoader", module
        for function in functions(module):
            for hint in map(str, function.__annotations__.values()):
                if re.search(r"\b(Float|Int|Int64|UInt8|Bool)\[", hint):
                    assert shapes.shaped(eval(hint, function.__globals__)), (function, hint)
                    known += 1
    assert known > 100


def test_a_wrong_shape_is_refused_in_functions_methods_and_data_classes() -> None:
    pictures = torch.zeros(2, 3, 8, 8)
    with pytest.raises(TypeCheckError, match=r"parameters of probekit\.metrics\.lpips\.distances"):
        distances(pictures, pictures[:1])  # no parameter is wrong by itself
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        ActNorm(3).forward(pictures[0])
    with pytest.raises(TypeCheckError, match="parameter 'images'"):
        hooks.Swept(edit=pictures[0], others=pictures, images=pictures[:, :1])


def test_a_wrong_kind_of_array_is_refused_and_each_of_several_is_taken() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'latents'"):
        LatentSpace("z", (2,), "for tests", decoder=lambda z: z).decode(torch.zeros(1, 2, dtype=torch.int64))
    assert frechet(np.eye(4), torch.eye(4)) == pytest.approx(0, abs=1e-9)


def test_a_wrong_return_is_refused_also_inside_a_tuple() -> None:
    def pair(x: Float[Tensor, "n d"], right: bool) -> tuple[Float[Tensor, " n"], Float[Tensor, " d"]]:
        return (x[:, 0], x[0]) if right else (x[0], x[:, 0])

    promised = jaxtyped(pair, typechecker=shapes.checked)
    assert len(promised(torch.zeros(2, 3), True)) == 2
    with pytest.raises(TypeCheckError, match="return value"):
        promised(torch.zeros(2, 3), False)


def test_functions_without_shapes_are_left_alone() -> None:
    def plain(name: str) -> Nowhere:
        return name

    assert shapes.checked(plain) is plain
