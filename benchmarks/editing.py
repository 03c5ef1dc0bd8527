"""How well each inversion serves editing: scenes inverted under their captions and made again with one word changed.

    python benchmarks/editing.py [--model mini-sd] [--n 24] [--steps 20] [--guidance 3] [--methods plain,edict]

Scenes that the model has not seen are drawn and encoded, inverted under their captions without guidance, sampled back under the
same caption, and under one in which one word is another, at the guidance scale that is asked for. What they show then is read
off by the scene reader. A line a method:

- round trip: root mean square error of the states that are sampled back.
- calls: of the network, for a batch, there.
- std, KS: of the latents' values (of several states the first's), and their distance to the normal distribution.
- follows: of the edited pictures, how many show the new word. stays: of the other five attributes, how many are those of the
  scene. LPIPS: from the scene to the picture that was edited, as the autoencoder makes it.

`no inversion` is the same without one: the new caption from noise. `flow-edit` edits without inverting. Methods for flows need
a flow, such as mini-sd3.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
from scipy.stats import kstest
from torch import Tensor

from probekit import load, seeds
from probekit.data.scenes import VALUES, Scene, render, sample_scenes
from probekit.metrics import lpips
from probekit.metrics.readers import scene_reader
from probekit.sampling import sample
from probekit.sampling.editing import flow_edit
from probekit.sampling.inversions import INVERSIONS, inverted, noises, restored


def changed(scene: Scene, number: int) -> tuple[Scene, str]:
    """The scene with one attribute another, each attribute in turn, and which."""
    attribute = list(VALUES)[number % len(VALUES)]
    generator = seeds.named("edit", number)
    while True:
        value = VALUES[attribute][int(torch.randint(len(VALUES[attribute]), (1,), generator=generator))]
        others = dataclasses.asdict(scene) | {attribute: value}
        if value != getattr(scene, attribute) and others["colour"] != others["ground"]:
            return Scene(**others), attribute


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="mini-sd")
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--methods", default="")
    asked = parser.parse_args()
    model, n = load(asked.model, device="cpu"), asked.n
    scenes = sample_scenes(n, seeds.numbered(0, 0), held_out=True)
    edits = [changed(scene, i) for i, scene in enumerate(scenes)]
    images = render(scenes, seeds.numbered(0, 1))
    plain, diffusion = model.conditioned(prompt=scenes[0].caption).diffusion, model.conditioned(prompt="").diffusion
    assert diffusion.captioned is not None and plain.captioned is not None
    guided = model.conditioned(prompt="", guidance=asked.guidance).diffusion
    assert guided.captioned is not None
    of_scenes = dataclasses.replace(plain, denoiser=lambda rows: plain.captioned([scene.caption for scene in scenes]))
    of_edits = dataclasses.replace(guided, denoiser=lambda rows: guided.captioned([scene.caption for scene, _ in edits]))
    schedule, states = plain.schedule(asked.steps), plain.encode(images)
    coded, reader = plain.decode(states), scene_reader()

    def judged(edited: Tensor) -> str:
        pictures = of_edits.decode(edited)
        read, follows, stays = reader.read(pictures), [], []
        for i, (scene, attribute) in enumerate(edits):
            for name, values in VALUES.items():
                found = values[int(read[name][i])] == getattr(scene, name)
                (follows if name == attribute else stays).append(found)
        far = float(lpips.distances(coded, pictures).mean())
        return f"{100 * sum(follows) / len(follows):.0f} % | {100 * sum(stays) / len(stays):.0f} % | {far:.3f}"

    print(f"{asked.model}, {n} scenes, {asked.steps} steps, guidance {asked.guidance:g}\n")
    print("| method | round trip | calls | std | KS | follows | stays | LPIPS |\n|---|---|---|---|---|---|---|---|")
    fresh = plain.noise(range(n), 0)
    print(f"| no inversion | | | 1 | 0 | {judged(sample(of_edits.denoiser(n), fresh, schedule).end)} |", flush=True)
    chosen = [name for name, way in INVERSIONS.items() if not way.flows or schedule.prediction == "flow"]
    for name in asked.methods.split(",") if asked.methods else chosen:
        drawn = seeds.fresh_noise(noises(name, asked.steps, plain.shape), range(n), 0)
        there = inverted(of_scenes, name, states, schedule, drawn)
        error = float((restored(of_scenes, name, there.end, schedule) - states).square().mean().sqrt())
        values = (there.end[:, 0] if INVERSIONS[name].parts(asked.steps) > 1 else there.end).flatten()
        spread, far = float(values.std()), float(kstest(values.double().numpy(), "norm").statistic)
        edited = restored(of_edits, name, there.end, schedule)
        print(f"| {name} | {error:.1e} | {there.calls} | {spread:.2f} | {far:.3f} | {judged(edited)} |", flush=True)
    drawn = seeds.fresh_noise((asked.steps, *plain.shape), range(n), 0)
    made = flow_edit(of_scenes.denoiser(n), of_edits.denoiser(n), states, schedule, drawn, skipped=asked.steps // 3)
    print(f"| flow-edit | | {made.calls} | | | {judged(made.end)} |", flush=True)
    print(f"\n{time.process_time():.0f} s of processor time")


if __name__ == "__main__":
    main()
