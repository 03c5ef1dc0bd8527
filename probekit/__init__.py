"""probekit: find out where generative image models keep what they know about an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    from probekit.inspector import inspect
    from probekit.models import load, load_space

__version__ = "0.1.0"
__all__ = ["ProbekitError", "__version__", "inspect", "load", "load_space"]


def __getattr__(name: str) -> Any:
    # `import probekit` stays light: torch and diffusers come with the first model
    if name in ("load", "load_space"):
        from probekit import models

        return getattr(models, name)
    if name == "inspect":
        from probekit.inspector import notebook

        return notebook.inspect
    raise AttributeError(f"module 'probekit' has no attribute {name!r}")
