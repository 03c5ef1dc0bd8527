"""The latent spaces of any denoiser, of pixels or of an autoencoder's code, conditional or not: made by one function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from probekit import hooks, seeds
from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models.model import Maker
from probekit.models.painter import Painter
from probekit.sampling import BATCH, Diffusion, Schedule, sample
from probekit.sampling.inversions import check_method, inverted, noises, restored
from probekit.sampling.schedule import check_steps, level_at, reversible

STEPS = 50
"""Of sampling and of inversion, where nothing else is asked for."""


def denoiser_spaces(diffusion: Diffusion, painter: Painter | None = None, guidance: float | None = None) -> dict[str, Maker]:
    """The makers of `inverted`, `noised`, `h`, `noise`, `code` and, of captions, `text`, `text-eos` and `text-pooled`.

    - `inverted`: the latent of an inversion (`sampling.inversions`); decoding samples from it.
    - `noised`: signal * image + noise * epsilon at timestep t (the last), epsilon from the generator; decoding samples from
      there. Only at the last timestep has it a prior to sample from, N(0, 1).
    - `h`: a layer's activation (Kwon et al. 2023 take the middle block's) for the image noised to timestep t (half the
      schedule), or the step's of `steps` that is nearest. The noise is one for all images, number 0 of seed 0, so that images
      alone make the difference. Decoding goes on from the noised image to the end with the layer changed at every step by what
      the latent differs from the image's own, as Kwon et al. add their delta h; the image is that of noise number 0 of `seed`,
      or the one that `rest_of` gives.
    - `noise`: what sampling starts from; nothing is encoded.
    - `code`: the autoencoder's code, scaled as the denoiser takes it; a model of pixels has none.
    - `text`: the caption's embeddings, all tokens, those that the pipeline leaves out 0; decoding paints from noise number 0 of
      `seed` as the pipeline does, where it has a pooled embedding beside the empty caption's.
      `text-eos`: that of the token that ends the caption; decoding gives it to all tokens but the first of an empty caption.
      `text-pooled`: the pooled embedding, beside the empty caption's tokens.

    guidance: the pipeline's for the text spaces, its own where None.
    """
    made = _Spaces(diffusion)
    spaces: dict[str, Maker] = {"inverted": made.inverted, "noised": made.noised, "h": made.h, "noise": made.noise}
    if diffusion.encoder is not None:
        spaces = {"code": made.code} | spaces
    if painter is not None and painter.encodes:
        of_text = _TextSpaces(diffusion, painter, guidance)
        spaces["text"] = of_text.text
        if painter.has_end:
            spaces["text-eos"] = of_text.eos
        if "pooled_prompt_embeds" in painter.encodes:
            spaces["text-pooled"] = of_text.pooled
    return spaces


class _Spaces:
    """The makers, each a function of its parameters."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion
        self.trained: int = diffusion.scheduler.config.num_train_timesteps

    def prior(self, n: int, generator: torch.Generator) -> Tensor:
        return seeds.drawn(self.diffusion.shape, n, generator)

    def sampled(self, schedule: Schedule) -> Callable[[Tensor], Tensor]:
        def decode(latents: Tensor) -> Tensor:
            walked = self.diffusion.walk(latents, lambda denoiser, part: sample(denoiser, part, schedule).end)
            return self.diffusion.decode(walked)

        return decode

    def inverted(self, method: str = "plain", steps: int = STEPS) -> LatentSpace:
        diffusion = self.diffusion
        schedule = diffusion.schedule(steps)
        inversion = check_method(method, schedule.prediction)
        parts, drawn = inversion.parts(steps), noises(method, steps, diffusion.shape)
        shape = (parts, *diffusion.shape) if parts > 1 else diffusion.shape

        def encode(images: Tensor, generator: torch.Generator) -> Tensor:
            fresh = seeds.drawn(drawn, len(images), generator) if inversion.draws(steps) else torch.zeros(len(images), *drawn)
            parts = zip(torch.split(diffusion.encode(images), BATCH), torch.split(fresh, BATCH), strict=True)
            return torch.cat([inverted(diffusion, method, states, schedule, noise).end.cpu() for states, noise in parts])

        def decode(latents: Tensor) -> Tensor:
            parts = torch.split(latents, BATCH)
            return diffusion.decode(torch.cat([restored(diffusion, method, part, schedule) for part in parts]))

        def prior(n: int, generator: torch.Generator) -> Tensor:
            begin = inversion.begin
            if begin is None:
                return seeds.drawn(shape, n, generator)
            return diffusion.walk(self.prior(n, generator), lambda denoiser, part: begin(denoiser, part, schedule))

        return LatentSpace(
            "inverted",
            shape,
            f"the latent of {steps} steps of {method} inversion",
            encode,
            decode,
            prior,
            parameters={"method": method, "steps": steps},
            made_of=diffusion.made_of,
        )

    def noise(self, steps: int = STEPS) -> LatentSpace:
        return LatentSpace(
            "noise",
            self.diffusion.shape,
            f"what {steps} steps of sampling start from",
            None,
            self.sampled(self.diffusion.schedule(steps)),
            self.prior,
            parameters={"steps": steps},
            made_of=self.diffusion.made_of,
        )

    def noised(self, t: int | None = None, steps: int = STEPS) -> LatentSpace:
        diffusion, scheduler = self.diffusion, self.diffusion.scheduler
        t = self._timestep(t, self.trained - 1)
        scheduler = reversible({"_class_name": type(scheduler).__name__, **scheduler.config})
        check_steps(steps, self.trained)
        schedule = Schedule.of(scheduler, min(steps, t + 1), start=t)
        signal, noise = level_at(scheduler, t)

        def encode(images: Tensor, generator: torch.Generator) -> Tensor:
            return signal * diffusion.encode(images) + noise * self.prior(len(images), generator)

        return LatentSpace(
            "noised",
            diffusion.shape,
            f"the image noised to timestep {t}",
            encode,
            self.sampled(schedule),
            self.prior if t == self.trained - 1 else None,
            parameters={"t": t, "steps": steps},
            made_of=diffusion.made_of,
        )

    def code(self) -> LatentSpace:
        diffusion = self.diffusion
        return LatentSpace(
            "code",
            diffusion.shape,
            "the autoencoder's code",
            lambda images, _: diffusion.encode(images),
            diffusion.decode,
            made_of={"precision": diffusion.made_of["precision"]},
        )

    def h(
        self, layer: str | None = None, stream: str | None = None, t: int | None = None, steps: int = STEPS, seed: int = 0
    ) -> LatentSpace:
        diffusion = self.diffusion
        _check_seed(seed)
        known = hooks.layers(diffusion.network)
        layer = _middle(known, diffusion.network) if layer is None else layer
        found, *more = hooks.select(known, [layer])
        if more:
            raise ProbekitError(f"layer {layer!r}: names {1 + len(more)} layers, one is needed ({found.name}, …)")
        writes = found.stream(stream).writes  # refuses one that the layer does not have
        if len(writes) > 1:  # a whole down block, whose skips have shapes of their own
            if stream is not None:
                one = ", ".join(name for name, each in found.streams.items() if len(each.writes) == 1)
                raise ProbekitError(f"stream {stream!r} of layer {found.name}: is {len(writes)} tensors; choose {one}")
            stream = next(name for name, each in found.streams.items() if len(each.writes) == 1)
        t, schedule = self._timestep(t, self.trained // 2), diffusion.schedule(steps)
        # noise and sampling go on from a state of the schedule, the one whose timestep is nearest
        first = min(range(len(schedule)), key=lambda step: abs(schedule.timesteps[step] - t))
        signal, noise = schedule.level(first)
        epsilon = seeds.noise(diffusion.shape, [0], 0)

        def read(states: Tensor) -> Tensor:
            def activation(denoiser: Any, part: Tensor) -> Tensor:
                told = [schedule.timesteps[first] * diffusion.told]
                with hooks.capture(diffusion.network, [found.name], schedule=told, rows=len(part), stream=stream) as captured:
                    denoiser(part, schedule.timesteps[first])
                kept = captured[found.name, 0].float()
                return kept[0] if len(kept) == 1 else kept.transpose(0, 1)

            return diffusion.walk(states, activation)

        def noised(images: Tensor) -> Tensor:
            return signal * diffusion.encode(images) + noise * epsilon

        def around(states: Tensor) -> Callable[[Tensor], Tensor]:
            def decode(latents: Tensor) -> Tensor:
                if len(states) not in (1, len(latents)):
                    raise ProbekitError(f"{len(latents)} latents for the rest of {len(states)} images: as many are needed")
                start = states.expand(len(latents), *diffusion.shape)
                change = latents - read(states)
                changed = _go_on(diffusion, schedule, first, start, found.name, stream, change)
                return diffusion.decode(changed)

            return decode

        @functools.cache
        def base() -> Tensor:
            # in float64, so that sampling goes on as if it had not stopped here; mps has none
            start = diffusion.noise([0], seed)
            start = start if diffusion.device.type == "mps" else start.double()
            return diffusion.walk(start, lambda denoiser, part: sample(denoiser, part, schedule, keep=[first]).kept[first])

        shape = tuple(read(torch.zeros(1, *diffusion.shape)).shape[1:])
        return LatentSpace(
            "h",
            shape,
            f"{found.name}'s output at timestep {schedule.timesteps[first]:g}, the same noise on every image",
            lambda images, _: read(noised(images)),
            lambda latents: around(base())(latents),
            around=lambda images: around(noised(images)),
            made_of=diffusion.made_of,
            parameters={"layer": found.name, "stream": stream, "t": t, "steps": steps, "seed": seed},
        )

    def _timestep(self, t: int | None, default: int) -> int:
        if t is not None and not 0 <= t < self.trained:
            raise ProbekitError(f"t {t}: the schedule has timesteps 0 to {self.trained - 1}")
        return default if t is None else t


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ProbekitError(f"seed {seed}: choose 0 to {2**32 - 1}")


def _middle(known: Sequence[hooks.Layer], network: Any) -> str:
    """h-space's layer: the middle block, of a transformer the block in the middle."""
    names = [layer.name for layer in known]
    if "mid_block" in names:
        return "mid_block"
    blocks = hooks.select(known, hooks.default_layers(network))
    return blocks[len(blocks) // 2].name


def _go_on(
    diffusion: Diffusion, schedule: Schedule, first: int, states: Tensor, layer: str, stream: str | None, change: Tensor
) -> Tensor:
    """The images' states, sampled from step `first` on with a layer's output changed at every step, a row each."""
    rest = schedule.after(first)
    told = [timestep * diffusion.told for timestep in rest.timesteps]
    done = 0

    def way(denoiser: Any, part: Tensor) -> Tensor:
        nonlocal done
        mine = change[done : done + len(part)]
        done += len(part)
        rules = {
            row: [hooks.Injection(layer, source=mine[row], operation=hooks.add(1.0), stream=stream)] for row in range(len(part))
        }
        with hooks.inject(diffusion.network, rules, schedule=told, rows=len(part)):
            return sample(denoiser, part, rest).end

    return diffusion.walk(states, way)


class _TextSpaces:
    """The spaces of captions."""

    def __init__(self, diffusion: Diffusion, painter: Painter, guidance: float | None) -> None:
        self.diffusion, self.painter, self.guidance = diffusion, painter, guidance

    def _space(
        self,
        name: str,
        about: str,
        one: Callable[[str], Tensor],
        row: Callable[[Tensor], dict[str, Any]],
        steps: int,
        seed: int,
    ) -> LatentSpace:
        painter = self.painter
        _check_seed(seed)
        check_steps(steps, painter.pipeline.scheduler.config.num_train_timesteps)
        options = {"num_inference_steps": steps} | ({} if self.guidance is None else {"guidance_scale": self.guidance})

        def encode(captions: Sequence[str], generator: torch.Generator) -> Tensor:
            return torch.stack([one(caption).float().cpu() for caption in captions])

        def decode(latents: Tensor) -> Tensor:
            rows = [painter.embedded("") | row(latent) | {"generator": seeds.numbered(seed, 0)} for latent in latents]
            return torch.cat([painter.paint(rows[i : i + 25], **options).cpu() for i in range(0, len(rows), 25)])

        made_of = self.diffusion.made_of | {"guidance": self.guidance, "defaults": painter.defaults}
        return LatentSpace(
            name,
            tuple(one("").shape),
            about,
            encode,
            decode,
            takes="captions",
            parameters={"seed": seed, "steps": steps},
            made_of=made_of,
        )

    def _like(self, key: str, latent: Tensor) -> Tensor:
        return latent[None].to(self.painter.embedded("")[key])

    def text(self, seed: int = 0, steps: int = 20) -> LatentSpace:
        # which tokens the pipeline leaves out is seen by them: the others of a caption are never 0
        masked = "prompt_attention_mask" in self.painter.embedded("")

        def one(caption: str) -> Tensor:
            told = self.painter.embedded(caption)
            tokens = told["prompt_embeds"][0]
            return tokens * told["prompt_attention_mask"][0, :, None] if masked else tokens

        def row(latent: Tensor) -> dict[str, Any]:
            tokens = {"prompt_embeds": self._like("prompt_embeds", latent)}
            return tokens | ({"prompt_attention_mask": self._like("prompt_attention_mask", latent.any(-1))} if masked else {})

        return self._space("text", "the caption's embeddings, all tokens", one, row, steps, seed)

    def eos(self, seed: int = 0, steps: int = 20) -> LatentSpace:
        def one(caption: str) -> Tensor:
            return self.painter.embedded(caption)["prompt_embeds"][0, self.painter.end(caption)]

        def row(latent: Tensor) -> dict[str, Any]:
            tokens = self.painter.embedded("")["prompt_embeds"].clone()
            tokens[:, 1:] = latent.to(tokens)
            return {"prompt_embeds": tokens}

        return self._space("text-eos", "the embedding of the token that ends the caption", one, row, steps, seed)

    def pooled(self, seed: int = 0, steps: int = 20) -> LatentSpace:
        return self._space(
            "text-pooled",
            "the caption's pooled embedding",
            lambda caption: self.painter.embedded(caption)["pooled_prompt_embeds"][0],
            lambda latent: {"pooled_prompt_embeds": self._like("pooled_prompt_embeds", latent)},
            steps,
            seed,
        )
