"""The inspector: questions to a model's layers, answered in the browser and in a notebook, and finished runs beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probekit.inspector.notebook import inspect as inspect

__all__ = ["inspect"]


def __getattr__(name: str) -> Any:
    # the server's packages come with the first use
    if name == "inspect":
        from probekit.inspector import notebook

        return notebook.inspect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
