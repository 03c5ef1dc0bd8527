"""The command line: one app an experiment, and what looks at models and runs."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from probekit import ProbekitError, __version__
from probekit.experiments import dynamics, edit, inject, invert, latents, noise_map, probe, stitch

app = typer.Typer(
    help="Find out where generative image models keep what they know about an image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
zoo = typer.Typer(help="The small models that ship with probekit: train them, measure them.", no_args_is_help=True)
app.add_typer(inject.app, name="inject")
app.add_typer(stitch.app, name="stitch")
app.add_typer(probe.app, name="probe")
app.add_typer(dynamics.app, name="dynamics")
app.add_typer(invert.app, name="invert")
app.add_typer(latents.app, name="latents")
app.add_typer(noise_map.app, name="noise-map")
app.add_typer(zoo, name="zoo")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Find out where generative image models keep what they know about an image."""
    if version:
        typer.echo(__version__)


@app.command()
def layers(
    model: Annotated[str, typer.Argument(help="A bundled model, a local diffusers folder or a hub id.")],
    select: Annotated[list[str] | None, typer.Option("--layers", help="Names, globs or groups; repeat for more.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
) -> None:
    """List a model's layers: order, type, streams, output shape, parameters."""
    from probekit import hooks
    from probekit.models import load
    from probekit.report.terminal import print_layers

    loaded = load(model, device=device, dtype=dtype)
    print_layers(loaded, hooks.select(hooks.layers(loaded.denoiser), select or ["@all"]))


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(help="A model to look at. [default: the bundled ones]")] = None,
) -> None:
    """List models with their families, latent spaces and sizes, and what each space can do."""
    from probekit.bundled import MODELS, PIPELINES, trained
    from probekit.models import load
    from probekit.report.terminal import print_models

    bundled = [*PIPELINES, *(name for name in MODELS if trained(name)), "random"]
    print_models([load(name, device="cpu") for name in ([model] if model else bundled)])


@app.command()
def describe(run: Annotated[Path, typer.Argument(help="The folder of a finished run.")]) -> None:
    """Show the result of a finished run again, and write its report anew."""
    from probekit.runs import open_run

    config, rows = open_run(run)
    shows = {
        "inject-sweep": inject.show, "stitch-run": stitch.show, "probe-run": probe.show, "dynamics-flow": dynamics.show,
        "stitch-edit": edit.show, "invert-run": invert.show, "invert-trajectory": invert.show_trajectory,
        "invert-interpolate": invert.show_interpolation, "noise-map-run": noise_map.show,
        "dynamics-diffusion": dynamics.show_diffusion,
    }  # fmt: skip
    if config["experiment"] not in shows:
        raise ProbekitError(f"run {str(run)!r}: of an unknown experiment {config['experiment']!r}")
    shows[config["experiment"]](run, config, rows)


@zoo.command("list")
def zoo_list() -> None:
    """List the bundled models."""
    from probekit.report.terminal import print_zoo

    print_zoo()


@zoo.command()
def train(
    name: Annotated[str, typer.Argument(help="The model to train; see `probekit zoo list`.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write its weights. [default: in place of the bundled ones]")
    ] = None,
    checkpoints: Annotated[Path, typer.Option(help="Where a killed training goes on from.")] = Path(".training"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batches.")] = 0,
) -> None:
    """Train a bundled model by its recipe; killed and started again, it goes on where it was."""
    from probekit.bundled import weights
    from probekit.zoo import recipes

    recipe = recipes.find(name)
    recipe.train(out or weights(name), checkpoints, seed)


@zoo.command()
def evaluate(
    name: Annotated[str, typer.Argument(help="The model to measure; see `probekit zoo list`.")],
    n: Annotated[int, typer.Option(min=1, help="How many pictures to judge.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Seed of captions and noise.")] = 1,
) -> None:
    """Measure a bundled model and print the table that README quotes."""
    from probekit.report.terminal import print_evaluation
    from probekit.zoo import recipes

    print_evaluation(name, recipes.find(name).evaluate(n, seed))


def main() -> None:
    """Run the command line; what the user can mend is one line and exit code 2."""
    # what libraries warn of would bury a one-line error
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        from probekit.hooks.errors import ProbekitError

        # hooks are imported only when something has already loaded torch
        hook_error = getattr(sys.modules.get("probekit.hooks.layers"), "ProbekitError", ProbekitError)
        if isinstance(error, ProbekitError | hook_error):
            said = str(error)
        elif hasattr(error, "format_message"):  # typer's, about options: it would draw a box
            said = error.format_message()
        else:
            raise
        if said:  # where no command was given the help has been shown
            typer.echo(f"probekit: {' '.join(said.split())}", err=True)
        sys.exit(2)
    sys.exit(code or 0)
