"""``invdiff priors``: list, show, info, import, sample, train."""

import json
import sys
from collections import deque
from pathlib import Path

import click

from invdiff.cli.import_prior import import_, info


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


priors.add_command(info)
priors.add_command(import_)


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
        digest = sha256_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise PriorError(
            f"{folder}: not a prior ({error}); a prior is a folder with model.safetensors and config.json"
        ) from None
    for part in ("info", "network", "convention", "source", "training"):
        for key, value in config.get(part, {}).items():
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
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="A PNG, or a .nii[.gz] of slices.")
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


@priors.command()
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the training.")
@click.option("--config", type=click.Path(path_type=Path), help="JSON file with training options (see TrainConfig).")
@click.option("--minutes", type=float, help="Wall-clock minutes of the schedule (overrides the config).")
@click.option("--split", default="train", show_default=True, help="Split taken from a folder's manifest.json.")
@click.option("--validation-split", default="validation", show_default=True, help="Split for the held-out figures.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda[:N].")
@click.option("--quiet", is_flag=True, help="Errors only.")
def train(data, output, config, minutes, split, validation_split, threads, device, quiet):
    """Train the embedded network on volumes (.nii, .nii.gz) and slice stacks (.npz with an array 'hu').

    Run the same command again to resume. OUTPUT receives model.safetensors (fp16, EMA), state.json (options, curve)
    and last.safetensors (everything needed to resume).

    \b
    invdiff priors train volumes/ -o runs/chest --minutes 150
    """
    import torch

    from invdiff.errors import InputError, UsageError
    from invdiff.priors.train import TrainConfig, Trainer
    from invdiff.priors.training_data import find_volumes, load_source
    from invdiff.priors.validate import denoising_table

    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; name a folder with -o")
    if threads:
        torch.set_num_threads(threads)
    log = (lambda text: None) if quiet else click.echo
    try:
        options = json.loads(config.read_text()) if config else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{config}: not a readable JSON file ({error}); see TrainConfig for the options") from None
    if minutes is not None:
        options["minutes"] = minutes
    sources = [load_source(path) for path in find_volumes(list(data), split)]
    for source in sources:
        log(f"{source.name}: {len(source.slices)} slices, {source.modality}")
    trainer = Trainer(TrainConfig.from_dict(options), sources, output, device)
    trainer.run(log)
    held_out = [load_source(path) for path in find_volumes(list(data), validation_split)]
    table = denoising_table(trainer.ema.eval(), held_out)
    log("\n".join(["denoising PSNR (dB, data range 2) on " + ", ".join(s.name for s in held_out), *table.lines()]))
    (output / "validation.json").write_text(json.dumps(table.rows, indent=1))
