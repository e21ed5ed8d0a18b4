"""``invdiff priors``: list, show, info, import, sample, train, validate."""

import json
import sys
from collections import deque
from pathlib import Path

import click

from invdiff.cli.import_prior import import_, info
from invdiff.cli.options import Place
from invdiff.cli.train_prior import train, validate

_PARTS = ("info", "network", "convention", "source", "training")  # of config.json
_MEANING = {
    "tile": "side in pixels of the tiles of larger slices, none for whole ones, auto for the size of its training",
    "overlap": "of neighbouring tiles in pixels, auto for a quarter of a tile",
    "complex": "how a prior of one channel serves complex images",
    "planes": "images of the volume that the prior sees; auto: all where slices were too thick and, in CT and "
    "MRI with pnp, of a volume; else the slices",
    "precision": "numbers in which the network multiplies; auto is for networks of our own, else float32",
}


@click.group(invoke_without_command=True)
@click.pass_context
def priors(ctx):
    """List the priors that come with invdiff, look at one, import a foreign one, or train one."""
    if ctx.invoked_subcommand is None:
        from invdiff.priors import PRIORS

        for name, entry in PRIORS.items():
            click.echo(f"{name:10} {entry.summary}")
        from invdiff.priors.architectures import ARCHITECTURES

        click.echo("\nForeign networks that 'invdiff priors import' and '--prior FILE' read:")
        for name, row in ARCHITECTURES.items():
            click.echo(f"{name:10} {row.summary}")
        from dataclasses import fields

        from invdiff.priors.options import COMPLEX, PLANES, PriorOptions
        from invdiff.priors.precision import PRECISIONS

        click.echo("\nOptions on images that a prior was not made for (--set prior.NAME=VALUE):")
        for option in fields(PriorOptions):
            click.echo(f"{option.name:10} {_MEANING[option.name]}  [default: {option.default}]")
            values = {"complex": COMPLEX, "planes": PLANES, "precision": PRECISIONS}.get(option.name, {})
            for name, text in values.items():
                click.echo(f"    {name:8} {text}")


priors.add_command(info)
priors.add_command(import_)
priors.add_command(train)
priors.add_command(validate)


@priors.command()
@click.argument("name", default="embedded")
def show(name):
    """Describe the prior NAME (a name or a folder), without loading it into a network."""
    from invdiff.errors import PriorError
    from invdiff.files import sha256_file
    from invdiff.priors import prior_folder

    folder = prior_folder(name)
    try:
        config = json.loads((folder / "config.json").read_text())
        parts = {part: config.get(part, {}).items() for part in _PARTS}
        digest = sha256_file(folder / "model.safetensors")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise PriorError(
            f"{folder}: not a prior ({error}); a prior is a folder with model.safetensors and config.json"
        ) from None
    for part, values in parts.items():
        for key, value in values:
            click.echo(f"{part + '.' + key:24} {str(value)[:200]}")
    click.echo(f"{'sha256':24} {digest}")
    if (folder / "README.md").exists():
        click.echo((folder / "README.md").read_text())


@priors.command()
@click.argument("name", metavar="[PRIOR]", default="embedded")
@click.option("--sampler", default="dpmpp-2m", show_default=True, help="Name of a sampler; an unknown one lists them.")
@click.option("--schedule", default="log-snr", show_default=True, help="Spacing of the noise levels.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Steps down to no noise.")
@click.option("--count", type=click.IntRange(1, 1024), default=4, show_default=True, help="Number of samples.")
@click.option("--size", metavar="H,W", default="128,128", show_default=True, help="Rows and columns.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("-o", "--output", required=True, type=Place(path_type=Path), help="A PNG, or a .nii[.gz] of slices.")
@click.option("--set", "settings", multiple=True, metavar="sampler.NAME=VALUE", help="Any option of the sampler.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda[:N].")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--quiet", is_flag=True, help="Errors only.")
def sample(name, sampler, schedule, steps, count, size, seed, output, settings, device, overwrite, quiet):
    """Draw images from PRIOR (a name or a folder) without any data: what it believes images look like.

    \b
    invdiff priors sample -o samples.png
    invdiff priors sample runs/chest --sampler heun --schedule karras --steps 20 --count 16 --size 96,96 -o s.nii.gz
    """
    from invdiff.cli.options import numbers, split_sampler_settings
    from invdiff.destination import check_output
    from invdiff.errors import choose
    from invdiff.formats import WRITES
    from invdiff.samplers import SAMPLERS, make_sampler
    from invdiff.schedule import SCHEDULES

    choose(sampler, SAMPLERS, "sampler")
    choose(schedule, SCHEDULES, "schedule")
    rows, columns = numbers("--size", size, int, "H,W, e.g. 128,128", (2,))
    steppers = make_sampler(sampler, **split_sampler_settings(settings))
    target = check_output(output, overwrite, suffixes=(".png", *WRITES), beside=False)

    from invdiff.configure import pick_device
    from invdiff.priors import load_prior
    from invdiff.samples import sample_prior, save_samples
    from invdiff.solvers.unconditional import Unconditional

    place = pick_device(device)
    prior = load_prior(name, str(place))
    solver = Unconditional(steppers, schedule)
    run = sample_prior(prior, solver, steps, count, (rows, columns), seed, place)
    hidden = quiet or not sys.stderr.isatty()
    with click.progressbar(run, length=steps, label="sampling", file=sys.stderr, hidden=hidden) as progress:
        images = deque(progress, maxlen=1).pop()
    options = "".join(f", {text.removeprefix('sampler.')}" for text in settings)
    title = (
        f"{prior.info.name}: {sampler}{options}, {steps} steps ({steppers.calls(steps)} calls), {schedule}, seed {seed}"
    )
    save_samples(images.cpu().numpy(), target.volume, title, overwrite)
    if not quiet:
        click.echo(f"{target.volume.name}: {title}")
