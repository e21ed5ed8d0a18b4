"""``invdiff priors train`` and ``invdiff priors validate``."""

import json
import logging
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import click

from invdiff.cli.options import Place


def _data_options(command):
    """Which data are learnt from and which are held out; the same for both commands."""
    for option in reversed(
        (
            click.option("--split", default="train", show_default=True, help="Split of a manifest.json to train on."),
            click.option(
                "--validation-split", default="validation", show_default=True, help="Split of a manifest.json held out."
            ),
            click.option(
                "--hold-out",
                type=click.IntRange(0),
                help="Subjects held out of data without a manifest.json.  [default: one in ten, at least one of two]",
            ),
            click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]"),
            click.option("--device", default="cpu", show_default=True, help="cpu or cuda[:N]."),
            click.option("--quiet", is_flag=True, help="Errors only."),
        )
    ):
        command = option(command)
    return command


def _sources(data, split, validation_split, hold_out, log):
    """Slices to train on and slices held out."""
    from invdiff.priors.training_files import load_sources, split_files

    learnt, held = split_files(list(data), split, validation_split, hold_out)
    train, held_out = load_sources(learnt), load_sources(held)
    for sources, what in ((train, ""), (held_out, ", held out")):
        for source in sources:
            log(f"{source.name}: {len(source.slices)} slices, {source.modality}{what}")
    if not held_out:
        log("no subject is held out: there will be no validation")
    return train, held_out


def _configuration(config, settings, minutes, output):
    from invdiff.errors import InputError
    from invdiff.files import read_text, show
    from invdiff.priors.train_config import TrainConfig, with_settings
    from invdiff.priors.training_state import resumed

    try:
        options = json.loads(read_text(config)) if config else {}
        if not isinstance(options, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{show(config)}: not a readable JSON file ({error}); see TrainConfig for the options"
        ) from None
    if minutes is not None:
        options["minutes"] = minutes
    return TrainConfig.from_dict(resumed(output, with_settings(options, settings)))


@click.command()
@click.argument("data", nargs=-1, required=True, type=Place(path_type=Path))
@click.option("-o", "--output", required=True, type=Place(path_type=Path), help="Folder of the training.")
@click.option("--config", type=Place(path_type=Path), help="JSON file with training options (see TrainConfig).")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any training option; repeatable.")
@click.option("--minutes", type=float, help="Wall-clock minutes of the schedule (overrides the config).")
@_data_options
def train(data, output, config, settings, minutes, split, validation_split, hold_out, threads, device, quiet):
    """Train the embedded network on DATA: volumes, slice stacks (.npz with an array 'hu'), DICOM and PNG folders.

    Folders are searched; one next to the top is a subject, and so is a file, unless a manifest.json says more.
    Run the same command again to resume, after Ctrl-C, SIGTERM or a kill. OUTPUT receives model.safetensors and
    config.json (the prior: fp16, EMA), state.json (options, curve), last.safetensors (what a resume needs) and, at the
    end, validation.json (denoising of held-out subjects, nearest training slices of samples), samples.png, curve.png.

    \b
    invdiff priors train volumes/ -o runs/chest --minutes 150
    invdiff priors train ct/ mr/ -o runs/both --set classes=CT,image      # then --prior runs/both:CT
    invdiff priors train ct/ -o runs/masked --set measured.keep=0.6       # 40 % of the pixels are never seen
    invdiff priors train ct/ -o runs/ours --set start=embedded --set rate=3e-4  # go on from a prior
    torchrun --nproc-per-node 2 -m invdiff priors train ct/ -o runs/two --device cuda

    \b
    --set precision=auto    bfloat16 where the processor has it
    --set reference=256     stable target field with so many crops
    --set steps=20000       a schedule in steps instead of minutes
    """
    import torch

    from invdiff.priors.distributed import ranks
    from invdiff.stopping import stop_signals

    if threads:
        torch.set_num_threads(threads)
    options = _configuration(config, settings, minutes, output)
    _check_folder(output)
    with stop_signals() as stop:
        with ranks(device) as place:
            if not place.first:  # which says it for all
                logging.getLogger("invdiff").setLevel(logging.ERROR)
            log = click.echo if place.first and not quiet else lambda text: None
            with _alone(output) if place.first else nullcontext():
                learnt, held_out = _sources(data, split, validation_split, hold_out, log)
                _train(options, learnt, held_out, output, place, log, stop)
        if place.first:
            _report(output, learnt, held_out, str(place.device), log)


def _check_folder(folder):
    """Refuse to write over a prior, or other files of these names, that no training here has made."""
    from invdiff.errors import UsageError
    from invdiff.files import show

    names = ("model.safetensors", "config.json", "state.json", "validation.json", "samples.png", "curve.png")
    there = [name for name in names if (folder / name).exists()]
    if there and not (folder / "last.safetensors").exists():
        raise UsageError(f"{show(folder)}: holds {there[0]} but no training; name another folder with -o")


@contextmanager
def _alone(folder):
    """A folder to write to, made where it is not there, and no other training in it; if it is left empty it goes."""
    from invdiff.destination import locked
    from invdiff.files import make_folder, sweep

    new = not folder.exists()
    make_folder(folder)
    try:
        with locked(folder / "state.json"):
            for name in ("last.safetensors", "state.json", "model.safetensors", "config.json", "validation.json"):
                sweep(folder / name)
            yield
    finally:
        if new:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _train(options, learnt, held_out, output, place, log, stop):
    """Train to the end.

    Raises:
        Interrupted: a signal came; says what is saved.
    """
    from invdiff.errors import Interrupted
    from invdiff.priors.train import Trainer

    trainer = Trainer(options, learnt, output, held_out=held_out, place=place)
    try:
        with stop.between_steps():
            done = trainer.run(log, lambda: bool(stop.asked))
    except KeyboardInterrupt:
        what = f"{trainer.saved} steps are saved" if trainer.saved else "nothing is saved yet"
        raise Interrupted(f"training stopped at once, {what}; the same command goes on") from None
    if not done:
        raise Interrupted(f"training stopped at step {trainer.steps} and saved; the same command goes on")


def _report(folder, learnt, held_out, device, log):
    """What a training ends with."""
    from invdiff.errors import Interrupted
    from invdiff.training_report import write_report

    try:
        write_report(folder, learnt, held_out, device=device, log=log)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted while the report was drawn; the training is finished and saved: 'invdiff priors validate' "
            "draws it"
        ) from None


@click.command()
@click.argument("folder", metavar="PRIOR", type=Place(path_type=Path))
@click.argument("data", nargs=-1, required=True, type=Place(path_type=Path))
@click.option("-o", "--output", type=Place(path_type=Path), help="Folder for the files.  [default: PRIOR]")
@click.option("--count", type=click.IntRange(1, 256), default=8, show_default=True, help="Number of samples.")
@_data_options
def validate(folder, data, output, count, split, validation_split, hold_out, threads, device, quiet):
    """Judge the network in the folder PRIOR by DATA, given as to 'train': the files that a training ends with.

    validation.json gets denoising figures of the subjects held out, beside classical denoisers where these are
    installed, and the nearest training slice of unconditional samples; samples.png and curve.png are drawn.

    \b
    invdiff priors validate runs/chest volumes/
    """
    import torch

    from invdiff.configure import pick_device
    from invdiff.errors import UsageError
    from invdiff.files import show
    from invdiff.training_report import write_report

    if not folder.is_dir():
        raise UsageError(f"{show(folder)}: is no folder of a prior; name one that was trained or imported")
    if threads:
        torch.set_num_threads(threads)
    log = (lambda text: None) if quiet else click.echo
    learnt, held_out = _sources(data, split, validation_split, hold_out, log)
    write_report(folder, learnt, held_out, output, str(pick_device(device)), count, log)
