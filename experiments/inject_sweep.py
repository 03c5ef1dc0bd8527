"""Injection: what happens to a picture when a layer is taken from another one (The Evolving Nature of Latent Spaces, 3.1)."""

from __future__ import annotations

import functools
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import pandas as pd
    from rich.progress import Progress
    from torch import Tensor

    from probekit import hooks
    from probekit.metrics.descriptors import Descriptor
    from probekit.models import TextToImage
    from probekit.runs import Run

app = typer.Typer(help="Swap layers between two generations and see what comes over.", no_args_is_help=True)

FACTORS = ("structure", "content", "surface")
OWN = "own"
"""The factor of a user's pair that names none."""


@dataclass(frozen=True)
class Pair:
    """Two prompts that share their noise, the factor they differ in, and an unrelated donor for the null."""

    name: str
    factor: str
    original: str
    edit: str
    unrelated: str
    seed: int


Model = Annotated[str, typer.Option(help="A bundled model, a local diffusers folder or a hub id.")]
Layers = Annotated[
    list[str] | None, typer.Option("--layers", help="Layer names, globs or groups such as @resnets; repeat for more.")
]
StepsOption = Annotated[str, typer.Option(help="Steps to inject at: all, 0-9, 0,3,5, 0%-50% or t1000-200.")]
StreamOption = Annotated[
    str | None, typer.Option("--stream", help="main, skip, both, image or text. [default: the layer's own]")
]
NumSteps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. [default: 3 for mini-sd, else the pipeline's own]")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise and of the pairs.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Original = Annotated[str, typer.Option("--prompt-original", help="The prompt of O, the picture that is changed.")]
Edit = Annotated[str, typer.Option("--prompt-edit", help="The prompt of E, the picture that layers are taken from.")]
Chosen = Annotated[list[str], typer.Option("--layers", help="Layer names, globs or groups such as @mid; repeat for more.")]
Picture = Annotated[Path, typer.Option(help="The picture to write: O, E and the result, side by side.")]


@app.command()
def sweep(
    model: Model = "mini-sd",
    pairs: Annotated[int | None, typer.Option(min=1, help="Controlled pairs for each factor. [default: 8]")] = None,
    factors: Annotated[
        str | None, typer.Option(help="Factors to vary, separated by commas. [default: structure,content,surface]")
    ] = None,
    prompt_original: Annotated[
        str | None, typer.Option(help="A prompt of your own for O, instead of controlled pairs.")
    ] = None,
    prompt_edit: Annotated[str | None, typer.Option(help="A prompt of your own for E.")] = None,
    pairs_file: Annotated[
        Path | None, typer.Option(help="YAML list of pairs: original, edit, and if you like factor, unrelated, seed.")
    ] = None,
    layers: Layers = None,
    stream: StreamOption = None,
    steps: StepsOption = "all",
    num_steps: NumSteps = 20,
    guidance: Guidance = None,
    seed: Seed = 0,
    separate_noise: Annotated[bool, typer.Option("--separate-noise", help="Give E a noise of its own.")] = False,
    by_time: Annotated[bool, typer.Option("--by-time", help="Cut the steps into windows: a layer x time map.")] = False,
    windows: Annotated[int | None, typer.Option(min=2, help="Windows of --by-time. [default: 4]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Rows at a time. [default: by the model's size]")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/inject-sweep/…]")] = None,
) -> None:
    """Inject every layer of E into O, one layer at a time, and measure what each layer carries."""
    from probekit import hooks
    from probekit.models import load_text_to_image
    from probekit.runs import Run, default_folder

    chosen = make_pairs(pairs, factors, prompt_original, prompt_edit, pairs_file, seed)
    if windows is not None and not by_time:
        raise ProbekitError(f"--windows {windows}: goes with --by-time")
    window_steps = make_windows(steps, num_steps, (windows or 4) if by_time else 1)
    loaded = load_text_to_image(model, device=device, dtype=dtype)
    check_steps(loaded, window_steps, num_steps)
    selected = hooks.select(loaded.layers, layers or hooks.default_layers(loaded.denoiser))
    if stream is not None and layers is None and any(stream in la.streams for la in selected):
        selected = [la for la in selected if stream in la.streams]
    for la in selected:
        la.stream(stream)  # refuses a stream that the layer does not have
    names = [la.name for la in selected]
    scale = loaded.defaults.get("guidance_scale") if guidance is None else guidance
    options: dict[str, Any] = {
        "model": model, "digest": loaded.digest, "pairs": [vars(p) for p in chosen], "layers": names, "stream": stream,
        "windows": list(window_steps), "num_steps": num_steps, "guidance": scale, "seed": seed,
        "separate_noise": separate_noise, "dtype": str(loaded.pipeline.dtype).removeprefix("torch."),
    }  # fmt: skip
    folder = out or default_folder("inject-sweep", Path(model).name, options)
    run = Run(folder, "inject-sweep", options, sys.argv)
    rows = run_pairs(run, loaded, chosen, window_steps, batch_size)
    show(folder, run.config | {"command": sys.argv}, rows)


@app.command()
def image(
    original: Original,
    edit: Edit,
    layers: Chosen,
    operation: Annotated[str, typer.Option(help="replace, blend or add.")] = "replace",
    weight: Annotated[float | None, typer.Option(help="Weight of blend, or scale of add. [default: 1]")] = None,
    model: Model = "mini-sd",
    steps: StepsOption = "all",
    stream: StreamOption = None,
    num_steps: NumSteps = 20,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Picture = Path("injected.png"),
) -> None:
    """One custom injection: the chosen layers of E, together, into O."""
    from probekit import hooks

    if operation == "replace" and weight is not None:
        raise ProbekitError(f"--weight {weight:g}: replace has none; it is for --operation blend or add")
    scale = 1.0 if weight is None else weight
    operations = {"replace": hooks.replace, "blend": hooks.blend(scale), "add": hooks.add(scale)}
    if operation not in operations:
        raise ProbekitError(f"--operation {operation!r}: choose from {', '.join(operations)}")
    chosen = operations[operation]
    _picture(chosen, original, edit, layers, model, steps, stream, num_steps, guidance, seed, device, dtype, out)


@app.command()
def script(
    file: Annotated[Path, typer.Argument(help="A Python file that defines operation(target, source, context) -> tensor.")],
    original: Original,
    edit: Edit,
    layers: Chosen,
    model: Model = "mini-sd",
    steps: StepsOption = "all",
    stream: StreamOption = None,
    num_steps: NumSteps = 20,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Picture = Path("injected.png"),
) -> None:
    """One injection with a function of your own, called at every chosen layer and step."""
    import runpy

    try:
        operation = runpy.run_path(str(file)).get("operation")
    except OSError as error:
        raise ProbekitError(f"script {str(file)!r}: cannot be read ({error.strerror})") from error
    except Exception as error:
        raise ProbekitError(f"script {str(file)!r}: {type(error).__name__}: {error}") from error
    if not callable(operation):
        raise ProbekitError(f"script {str(file)!r}: must define operation(target, source, context) -> tensor")

    def guarded(target: Tensor, source: Tensor, context: hooks.Context) -> Tensor:
        try:
            return operation(target, source, context)
        except Exception as error:
            raise ProbekitError(f"script {str(file)!r} at {context.layer}: {type(error).__name__}: {error}") from error

    _picture(guarded, original, edit, layers, model, steps, stream, num_steps, guidance, seed, device, dtype, out)


def _picture(
    operation: hooks.Operation, original: str, edit: str, layers: list[str], model: str, steps: str, stream: str | None,
    num_steps: int, guidance: float | None, seed: int, device: str, dtype: str, out: Path,
) -> None:  # fmt: skip
    """Make and write the picture of one custom injection."""
    import torch

    from probekit import hooks
    from probekit.models import load_text_to_image
    from probekit.images import save_png
    from probekit.runs import writing

    if out.suffix.lower() != ".png":
        raise ProbekitError(f"--out {str(out)!r}: name a .png file")
    when = hooks.Steps.parse(steps)
    loaded = load_text_to_image(model, device=device, dtype=dtype)
    chosen = hooks.select(loaded.layers, layers)
    rule = [hooks.Injection(la.name, steps=when, stream=stream, operation=operation) for la in chosen]
    options: dict[str, Any] = {"num_inference_steps": num_steps}
    if guidance is not None:
        options["guidance_scale"] = guidance
    check_steps(loaded, {steps: when}, num_steps)
    swept = loaded.sweep((original, seed), (edit, seed), [[], rule], **options)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        save_png(torch.cat([swept.images[0], swept.edit, swept.images[1]], dim=2), out)
    typer.echo(f"{', '.join(la.name for la in chosen)}\nO, E and the result: {out}")


def make_pairs(
    count: int | None, factors: str | None, original: str | None, edit: str | None, file: Path | None, seed: int
) -> list[Pair]:
    """The pairs that the options ask for. Raises ProbekitError where they contradict each other or the file is not in order."""
    own = original is not None or edit is not None
    if own and (original is None or edit is None):
        raise ProbekitError("--prompt-original and --prompt-edit go together: give both")
    if own and file is not None:
        raise ProbekitError("--pairs-file: give either the file or --prompt-original and --prompt-edit")
    if (own or file is not None) and (count is not None or factors is not None):
        given = f"--pairs {count}" if count is not None else f"--factors {factors!r}"
        raise ProbekitError(f"{given}: is for controlled pairs of scenes, not for prompts of your own")
    if file is not None:
        return read_pairs(file, seed)
    if original is not None and edit is not None:
        return [Pair("own-00", OWN, original, edit, _UNRELATED, seed)]
    return scene_pairs([f.strip() for f in (factors or ",".join(FACTORS)).split(",")], count or 8, seed)


_UNRELATED = "a small black cross at the bottom on a striped yellow ground"
"""The null's donor where nothing better is known."""


def scene_pairs(factors: list[str], count: int, seed: int) -> list[Pair]:
    """`count` controlled pairs of scenes for each factor.

    The unrelated donor differs from both in every attribute but size, which has two values only.
    """
    for factor in factors:
        if factor not in FACTORS:
            raise ProbekitError(f"--factors {factor!r}: choose from {', '.join(FACTORS)}")
    import torch

    from probekit.data.scenes import VALUES, all_scenes, controlled_pair

    scenes, pairs = all_scenes(), []
    for factor in dict.fromkeys(factors):
        generator = torch.Generator().manual_seed(seed * 101 + FACTORS.index(factor))
        for i in range(count):
            original, edit = controlled_pair(factor, generator)
            while True:
                other = scenes[int(torch.randint(len(scenes), (), generator=generator))]
                if all(getattr(other, a) not in (getattr(original, a), getattr(edit, a)) for a in VALUES if a != "size"):
                    break
            noise = seed * 100_003 + FACTORS.index(factor) * 1009 + i
            pairs.append(Pair(f"{factor}-{i:02d}", factor, original.caption, edit.caption, other.caption, noise))
    return pairs


def read_pairs(file: Path, seed: int) -> list[Pair]:
    """Pairs from YAML. Raises ProbekitError that names the entry and the key."""
    import yaml

    try:
        entries = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ProbekitError(f"--pairs-file {str(file)!r}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProbekitError(f"--pairs-file {str(file)!r}: is no YAML ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(entries, list) or not entries:
        raise ProbekitError(f"--pairs-file {str(file)!r}: must be a list of pairs, each with original and edit")
    for i, entry in enumerate(entries):
        _check_entry(f"--pairs-file {str(file)!r}, pair {i + 1}", entry)
    pairs: list[Pair] = []
    for i, entry in enumerate(entries):
        factor = entry.get("factor", OWN)
        name = "".join(c if c.isalnum() else "_" for c in factor) + f"-{i:02d}"
        others = (
            other["edit"] for other in entries if not {other["original"], other["edit"]} & {entry["original"], entry["edit"]}
        )
        unrelated = entry.get("unrelated") or next(others, _UNRELATED)
        pairs.append(Pair(name, factor, entry["original"], entry["edit"], unrelated, entry.get("seed", seed + i)))
    return pairs


def _check_entry(where: str, entry: Any) -> None:
    """Raise ProbekitError, naming the key, where a pair from a file is not in order."""
    kinds: dict[str, type] = {"original": str, "edit": str, "factor": str, "unrelated": str, "seed": int}
    if not isinstance(entry, dict):
        raise ProbekitError(f"{where}: must have the keys original and edit")
    for key in ("original", "edit"):
        if key not in entry:
            raise ProbekitError(f"{where}: the key {key!r} is missing")
    for key, value in entry.items():
        if key not in kinds:
            raise ProbekitError(f"{where}: unknown key {key!r}; known: {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or (isinstance(value, int) and value < 0):
            raise ProbekitError(f"{where}: {key} {value!r} must be {'a whole number from 0' if key == 'seed' else 'text'}")


def make_windows(steps: str, num_steps: int, count: int) -> dict[str, hooks.Steps]:
    """The steps asked for, by the label they have in the results; with `count` > 1 also that many equal parts of them."""
    from probekit.hooks import Steps

    chosen = Steps.parse(steps)
    if chosen.timesteps is None:
        chosen.resolve(range(num_steps))
    windows = {steps: chosen}
    if count > 1:
        if chosen.indices is not None or chosen.timesteps is not None:
            raise ProbekitError(f"--steps {steps!r}: with --by-time, give percents such as 0%-50%, or all")
        start, stop = chosen.fraction or (0.0, 1.0)
        cuts = [start + (stop - start) * k / count for k in range(count + 1)]
        for part in itertools.pairwise(cuts):
            windows[f"{100 * part[0]:.3g}%-{100 * part[1]:.3g}%"] = Steps(fraction=part)
        if any(not any(a <= i / num_steps < b for i in range(num_steps)) for a, b in itertools.pairwise(cuts)):
            raise ProbekitError(f"--windows {count}: some hold no step, there are too few of them in {steps}")
    return windows


def check_steps(model: TextToImage, windows: dict[str, hooks.Steps], num_steps: int) -> None:
    """Raise ProbekitError, before anything is written, where a window lies outside the pipeline's schedule."""
    from probekit.hooks.steps import distinct_timesteps

    try:
        model.pipeline.scheduler.set_timesteps(num_steps)
    except (TypeError, ValueError):  # Flux's schedule depends on the picture's size and is known only to the pipeline
        return
    for steps in windows.values():
        steps.resolve(distinct_timesteps(model.pipeline.scheduler))


def run_pairs(
    run: Run, model: TextToImage, pairs: list[Pair], windows: dict[str, hooks.Steps], batch_size: int | None
) -> pd.DataFrame:
    """Sweep every pair that is not finished yet, and collect all rows."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    waiting = [p for p in pairs if not run.finished(p.name)]
    rows_per_pair = 2 * len(windows) * len(run.config["options"]["layers"]) + 1
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} pictures"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress:
        done = (len(pairs) - len(waiting)) * rows_per_pair
        task = progress.add_task("injecting", total=len(pairs) * rows_per_pair, completed=done)
        for pair in waiting:
            progress.update(task, description=f"injecting {pair.name}")
            try:
                _run_pair(run, model, pair, windows, batch_size, progress)
            except KeyboardInterrupt:
                typer.echo(
                    f"interrupted: finished pairs are kept in {run.folder}, the same command goes on from there", err=True
                )
                raise
    return run.collect([p.name for p in pairs])


def _run_pair(
    run: Run, model: TextToImage, pair: Pair, windows: dict[str, hooks.Steps], batch_size: int | None, progress: Progress
) -> None:
    import pandas as pd
    import torch

    from probekit import hooks

    options = run.config["options"]
    layers = [la for la in model.layers if la.name in options["layers"]]
    places = [(window, steps, la) for window, steps in windows.items() for la in layers]
    rules = [[hooks.Injection(la.name, steps=steps, stream=options["stream"])] for _, steps, la in places]
    call: dict[str, Any] = {
        "num_inference_steps": options["num_steps"],
        "batch_size": batch_size or rows_at_a_time(model),
        "on_batch": lambda count: progress.advance(progress.task_ids[0], count),
    }
    if options["guidance"] is not None:
        call["guidance_scale"] = options["guidance"]
    seed_of_e = pair.seed + 50_021 if options["separate_noise"] else pair.seed
    original = (pair.original, pair.seed)
    swept = model.sweep(original, (pair.edit, seed_of_e), [[], *rules], **call)
    null = model.sweep(original, (pair.unrelated, seed_of_e), rules, **call)
    o, e = swept.images[0], swept.edit
    donors = {"edit": swept.images[1:], "unrelated": null.images}
    rows = [
        {"pair": pair.name, "factor": pair.factor, "seed": pair.seed, "window": window, "order": la.order, "layer": la.name,
         "donor": donor, "descriptor": descriptor.name} | scores
        for descriptor in _descriptors(model, pair)
        for donor, images in donors.items()
        for (window, _, la), scores in zip(places, _score(descriptor, o, e, images), strict=True)
    ]  # fmt: skip
    pictures = {"O": o, "E": e, "U": null.edit}
    for k, (window, _, la) in enumerate(places):
        pictures[f"{window}_{la.name}".replace("%", "pct")] = donors["edit"][k]
    run.write(pair.name, pd.DataFrame(rows), {name: torch.as_tensor(image) for name, image in pictures.items()})


def _score(descriptor: Descriptor, o: Any, e: Any, images: Any) -> list[dict[str, float]]:
    from probekit.metrics.roles import damage, transfer

    seen_o, seen_e = descriptor.features(o[None])[0], descriptor.features(e[None])[0]
    between = descriptor.distance(seen_o, seen_e)
    scores = []
    for seen in descriptor.features(images):
        to_o, to_e = descriptor.distance(seen_o, seen), descriptor.distance(seen_e, seen)
        scores.append({"to_original": to_o, "to_edit": to_e, "between": between,
                       "transfer": transfer(to_o, to_e, between), "damage": damage(to_o, to_e, between)})  # fmt: skip
    return scores


def _descriptors(model: TextToImage, pair: Pair) -> list[Descriptor]:
    """The descriptors that apply: the scene reader to pairs of scenes, on a model of scenes, in what their factor changes."""
    from probekit.data.scenes import FACTORS as ATTRIBUTES
    from probekit.data.scenes import Scene
    from probekit.bundled import PIPELINES, weights

    if model.name not in PIPELINES:
        return _general_descriptors("openai/clip-vit-base-patch32")
    general = _general_descriptors(str(weights("scene-clip")))
    try:
        original, edit = vars(Scene.parse(pair.original)), vars(Scene.parse(pair.edit))
    except ProbekitError:
        return general
    differ = tuple(a for a in original if original[a] != edit[a] and a in ATTRIBUTES.get(pair.factor, original))
    return [_reader_descriptor(differ), *general] if differ else general


@functools.cache
def _general_descriptors(clip: str) -> list[Descriptor]:
    from probekit.metrics.descriptors import clip_descriptor, paper_descriptors

    try:
        return [*paper_descriptors(), clip_descriptor(clip)]
    except OSError:
        typer.echo(f"CLIP similarity is left out: {clip} is not in the local cache (hf download {clip})", err=True)
        return paper_descriptors()


@functools.cache
def _reader_descriptor(attributes: tuple[str, ...]) -> Descriptor:
    from probekit.metrics.descriptors import reader_descriptor

    return reader_descriptor(attributes)


def rows_at_a_time(model: TextToImage) -> int:
    """Batch rows that a model of this size is given by default: 64 at 16x16 latents, 8 at 64x64, 2 at 128x128."""
    size = getattr(model.denoiser.config, "sample_size", None) or 128
    side = size if isinstance(size, int) else max(size)
    return max(2, min(64, 32_768 // side**2))


def show(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished sweep and print its result."""
    from probekit.report.injection import Findings, print_roles, write_report
    from probekit.runs import writing

    findings = Findings.of(config, rows)
    with writing(folder):
        report = write_report(folder, config, findings)
    print_roles(findings)
    typer.echo(f"\nreport: {report}")
