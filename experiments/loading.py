"""How an experiment's model is loaded: the options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16; text-to-image models only.")]
Variant = Annotated[
    str | None, typer.Option(help="Which of a pipeline's files to load, such as fp16. [default: found by itself]")
]
Offload = Annotated[str, typer.Option(help="What waits on the CPU until the GPU needs it: none, model or sequential.")]
