"""The command line: parses, picks the engine, prints. Every experiment's command is made from its class."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from probekit import ProbekitError, __version__, checked
from probekit.experiments import EXPERIMENTS, find
from probekit.experiments.latents_encode import LatentsEncode
from probekit.experiments.loading import Dtype, Offload, Variant
from probekit.runs.experiment import Experiment, Options, options_of, signature


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a command as an interruption does."""


class _Commands(TyperGroup):
    """All commands: one that is stopped says in one line what it has kept."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            typer.echo(f"probekit: {stopped or 'interrupted, before anything was begun'}", err=True)
            raise typer.Exit(143 if isinstance(stopped, _Terminated) else 130) from None


app = typer.Typer(
    cls=_Commands,
    help="Find out where generative image models keep what they know about an image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_GROUPS = {
    "inject": "Swap layers between two generations and see what comes over.",
    "stitch": "Map one model's latent space into another's by a linear map.",
    "probe": "Read attributes off latent spaces with linear probes.",
    "dynamics": "How latent spaces form while a model is trained.",
    "invert": "From images to latents and back, and where the latents lie.",
    "noise-map": "Which noise belongs to which sample, by L2.",
    "properties": "How dense, smooth, organized and relevant latent spaces are.",
    "latents": "Encode data sets into latent spaces, once.",
    "zoo": "The small models that ship with probekit: train them, measure them.",
}
groups: dict[str, typer.Typer] = {}
for group, about in _GROUPS.items():
    groups[group] = typer.Typer(help=about, no_args_is_help=True)
    groups[group].callback()(lambda: None)  # a group of one command keeps that command's name
    app.add_typer(groups[group], name=group, help=about)


@dataclass(frozen=True, kw_only=True)
class _How(Options):
    """How an experiment is run, whatever it is."""

    out: Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/…]")] = None
    engine: Annotated[str, typer.Option(help="local, ray, or ray:ADDRESS of a cluster.")] = "local"
    workers: Annotated[int | None, typer.Option(max=1000, help="Workers of --engine ray. [default: one a device]")] = None
    shard: Annotated[
        str | None, typer.Option(help="Do the i-th of n parts of the units, as 2/8; whoever comes last collects.")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None:  # before a model is loaded
            checked.folder_to_write(f"--out {str(self.out)!r}", self.out)


def _command(experiment: type[Experiment]) -> Callable[..., None]:
    """The function that typer makes an experiment's command from."""
    how = signature(_How).parameters

    def command(**given: Any) -> None:
        run = vars(_How(**{name: given.pop(name) for name in how}))
        findings = experiment(**given).run(**run)
        if findings is None:
            typer.echo(f"this part is done ({run['shard']}); units of others are missing: whoever comes last collects")
        else:
            findings.show()

    command.__signature__ = signature(experiment, *how.values())  # type: ignore[attr-defined]
    command.__doc__ = getdoc(experiment)
    return command


def _plain(made: Any) -> Callable[..., None]:
    """The function of a command that is a dataclass of options with a `run`, but no experiment of units."""

    def command(**given: Any) -> None:
        typer.echo(made(**given).run())

    command.__signature__ = signature(made)  # type: ignore[attr-defined]
    command.__doc__ = getdoc(made)
    return command


def _checked(function: Callable[..., None]) -> Callable[..., None]:
    """A command that is a function, its parameters parsed as those of the others are (`Option.parse`)."""
    options = options_of(function)

    def command(**given: Any) -> None:
        function(**{option.field: option.parse(given[option.field]) for option in options})

    command.__signature__ = signature(function)  # type: ignore[attr-defined]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__wrapped__ = function  # type: ignore[attr-defined]
    return command


for _name in EXPERIMENTS:
    _group, _verb = _name.rsplit("-", 1)
    groups[_group].command(_verb)(_command(find(_name)))
groups["latents"].command("encode")(_plain(LatentsEncode))


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Find out where generative image models keep what they know about an image."""
    if version:
        typer.echo(__version__)


@app.command()
@_checked
def layers(
    model: Annotated[str, typer.Argument(help="A bundled model, a local diffusers folder or a hub id.")],
    select: Annotated[list[str] | None, typer.Option("--layers", help="Names, globs or groups; repeat for more.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Dtype = "auto",
    variant: Variant = None,
    offload: Offload = "none",
) -> None:
    """List a model's layers: order, type, streams, output shape, parameters."""
    from probekit import hooks
    from probekit.models import load
    from probekit.report.terminal import print_layers

    loaded = load(model, device=device, dtype=dtype, variant=variant, offload=offload)
    print_layers(loaded, hooks.select(loaded.layers, select or ["@all"]))


@app.command()
@_checked
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
@_checked
def describe(run: Annotated[Path, typer.Argument(help="The folder of a finished run.")]) -> None:
    """Show the result of a finished run again, and write its report anew."""
    from probekit.runs.folder import Run

    opened = Run.opened(run)
    if (name := opened.config["experiment"]) not in EXPERIMENTS:
        raise ProbekitError(f"run {str(run)!r}: of an unknown experiment {name!r}")
    findings = find(name).of(opened.config["options"]).findings(opened, opened.results())
    findings.write()
    findings.show()


@app.command()
@_checked
def inspect(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL | RUN]...", help="A model, one or two folders of finished runs, or both. [default: mini-sd]"
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="Who sweeps: local, ray, or ray:ADDRESS of a cluster.")] = "local",
    host: Annotated[str, typer.Option(help="The address to listen on; any other can be reached from outside.")] = ("127.0.0.1"),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The port. [default: a free one from 7860 on]")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Dtype = "auto",
    variant: Variant = None,
    offload: Offload = "none",
) -> None:
    """Ask a model's layers in the browser, and look at finished runs."""
    import webbrowser

    from probekit.inspector.notebook import chosen
    from probekit.inspector.server import open_inspector

    if engine.partition(":")[0] not in ("local", "ray"):
        raise ProbekitError(f"--engine {engine!r}: choose local, ray or ray:ADDRESS")
    model, runs = chosen(tuple(subjects or ["mini-sd"]), device=device, dtype=dtype, variant=variant, offload=offload)
    opened = open_inspector(model, runs, dtype=dtype, engine=engine, host=host, port=port)
    typer.echo(f"inspector: {opened.url} (Ctrl+C ends it)")
    if browser:
        webbrowser.open(opened.url)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        opened.close()


@groups["zoo"].command("list")
def zoo_list() -> None:
    """List the bundled models."""
    from probekit.report.terminal import print_zoo

    print_zoo()


@groups["zoo"].command()
@_checked
def train(
    name: Annotated[str, typer.Argument(help="The model to train; see `probekit zoo list`.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write its weights. [default: in place of the bundled ones]")
    ] = None,
    checkpoints: Annotated[Path, typer.Option(help="Where a killed training goes on from.")] = Path(".training"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights and batches.")] = 0,
) -> None:
    """Train a bundled model by its recipe; killed and started again, it goes on where it was."""
    from probekit.bundled import weights
    from probekit.files import sweep
    from probekit.zoo import recipes

    recipe, folder = recipes.find(name), out or weights(name)
    for flag, place in (("--out", folder), ("--checkpoints", checkpoints)):
        checked.folder_to_write(f"{flag} {str(place)!r}", place)
    recipe.train(folder, checkpoints, seed)
    sweep(folder)  # of what one that was killed as it wrote its weights has left


@groups["zoo"].command()
@_checked
def evaluate(
    name: Annotated[str, typer.Argument(help="The model to measure; see `probekit zoo list`.")],
    n: Annotated[int, typer.Option(min=1, max=100_000, help="How many pictures to judge.")] = 500,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of captions and noise.")] = 1,
) -> None:
    """Measure a bundled model and print the table that README quotes."""
    from probekit.report.terminal import print_evaluation
    from probekit.zoo import recipes

    print_evaluation(name, recipes.find(name).evaluate(n, seed))


_LINE = 1600
"""Characters of an error that are shown; of a longer one its beginning and its end."""


def main() -> None:
    """Run the command line; what the user can mend is one line and exit code 2, SIGINT and SIGTERM one line and 130 and 143."""

    def terminate(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is threading.main_thread():  # a thread takes no signals
        signal.signal(signal.SIGTERM, terminate)
    # what libraries warn of would bury a one-line error
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if isinstance(error, ProbekitError):
            said = str(error)
        elif hasattr(error, "format_message"):  # typer's, about options: it would draw a box
            said = error.format_message()
        else:
            raise
        if said:  # where no command was given the help has been shown
            line = " ".join(said.split())
            typer.echo(f"probekit: {line if len(line) < _LINE else f'{line[: _LINE // 2]} … {line[-_LINE // 4 :]}'}", err=True)
        sys.exit(2)
    sys.exit(code or 0)
