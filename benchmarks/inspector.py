"""How quickly the inspector answers: the first preview and the whole answer to a click, for every layer of mini-sd in 12 steps.

python benchmarks/inspector.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from probekit import load
from probekit.inspector.desk import Desk


def main() -> None:
    """Print a table: median and worst, in seconds of the clock and of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(load("mini-sd", device="cpu"), Path(folder))
        began = time.perf_counter(), time.process_time()
        list(desk.ask("a", desk.first))
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        print(f"O and E with their layers, once a pair: {took[0]:.2f} s, {took[1]:.2f} s of the processor")
        clicks: list[tuple[float, float, float, float]] = []
        inside = ["up_blocks.1.attentions.0.transformer_blocks.0.attn2", "mid_block"]
        for layers in ([name] for name in (*desk.about["default_layers"], *inside)):
            began = time.perf_counter(), time.process_time()
            first = (0.0, 0.0)
            for event in desk.ask("a", desk.first | {"layers": layers}):
                if event.get("step") == 1:
                    first = time.perf_counter() - began[0], time.process_time() - began[1]
            clicks.append((*first, time.perf_counter() - began[0], time.process_time() - began[1]))
        desk.close()
    print("| a click on mini-sd, 12 steps | median | worst |\n|---|---|---|")
    for k, name in enumerate(("first preview, clock", "first preview, processor", "answer, clock", "answer, processor")):
        values = [click[k] for click in clicks]
        print(f"| {name} | {statistics.median(values):.2f} s | {max(values):.2f} s |")


if __name__ == "__main__":
    main()
