"""``invdiff reconstruct``."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import click

from invdiff.cli.options import (
    Range,
    gather_operator,
    heard,
    hush,
    input_options,
    operator_options,
    split_settings,
)
from invdiff.errors import NumericalError, UsageError
from invdiff.files import show
from invdiff.stopping import stop_signals


@click.command()
@click.argument("input", required=False, type=click.Path(path_type=Path))
@click.option("--op", help="Operator, e.g. ct-sparse, blur, sr (see 'invdiff operators').")
@operator_options
@click.option("--solver", default="pnp", show_default=True, help="Solver (see 'invdiff solvers').")
@click.option(
    "--prior", default="embedded", show_default=True, metavar="NAME|PATH", help="Prior (see 'invdiff priors')."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Result, in the format of its name.  [default: invdiff-OP.nii.gz]",
)
@click.option("--simulate", is_flag=True, help="INPUT is the ground truth: measure it, reconstruct it, score it.")
@click.option("--reference", type=click.Path(path_type=Path), help="Volume to score a measurement's result against.")
@click.option("--steps", type=click.IntRange(1), help="Steps of the solver.  [default: by solver]")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Posterior samples to average.")
@click.option("--noise", type=click.Choice(["gaussian", "rician", "poisson"]), help="Images.  [default: gaussian]")
@click.option(
    "--noise-level",
    type=click.FloatRange(0, 1, min_open=True),
    help="Noise of an image, share of its contrast.  [default: 0.01 simulated, else estimated]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of noise and draws.")
@click.option("--slices", type=Range(), help="Only slices A to B - 1 along the slice axis of the file.")
@click.option("--slice-axis", type=click.Choice(["auto", "0", "1", "2"]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]")
@click.option("--slice-batch", default="auto", show_default=True, metavar="auto|N", help="Slices per network call.")
@click.option(
    "--coupling", type=click.Choice(["auto", "tv-z", "quadratic-z", "none"]), default="auto", show_default=True
)
@click.option(
    "--compare", multiple=True, metavar="SOLVER", help="Baseline to show; repeatable.  [default: the operator's own]"
)
@click.option("--nan", type=click.Choice(["refuse", "fill"]), default="refuse", show_default=True)
@click.option("--volume-index", type=click.IntRange(0), help="Which 3D volume of a 4D file.")
@input_options
@click.option("--allow-shear", is_flag=True, help="Accept array axes that are not orthogonal (gantry tilt).")
@click.option(
    "--set", "settings", multiple=True, metavar="solver.NAME=VALUE", help="Any option of solver, operator or prior."
)
@click.option("--overwrite", is_flag=True, help="Replace existing output files.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint that an interrupted run left beside OUTPUT.")
@click.option(
    "--checkpoint-minutes",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="Save progress beside OUTPUT this often; 0 for never.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, predict time and memory, run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="Errors only.")
def reconstruct(input, op, output, overwrite, dry_run, as_json, quiet, **given):
    """Reconstruct INPUT: a measurement file, or with --simulate a volume; without INPUT a built-in phantom.

    \b
    invdiff reconstruct --op ct-sparse
    invdiff reconstruct scan.nii.gz --op ct-sparse --views 30 --simulate -o result.nii.gz
    """
    if quiet:
        hush()
    request = gather_request(input, op, given)
    outputs = pick_outputs(request, output, overwrite)
    if dry_run:
        from invdiff.plan import predict

        with heard(lambda text: click.echo(show(text), err=True)):
            plan = predict(request)
        click.echo(plan.text(as_json))
        return
    from invdiff.destination import locked
    from invdiff.files import sweep_private
    from invdiff.output import save_result

    say = (lambda text: None) if quiet or as_json else (lambda text: click.echo(show(text)))
    with stop_signals() as stop, locked(outputs.volume), heard(say) as said:
        outputs = replace(outputs, notes=(*outputs.notes, *sweep_private(outputs.volume.parent)))
        result = run_saved(request, outputs, Bar(say) if not (quiet or as_json) else None, stop)
        manifest = save_result(result, request, outputs, overwrite)
    for note in outputs.notes:
        say(note)
    if as_json:
        import json

        from invdiff.provenance import plain

        click.echo(json.dumps(plain(manifest), indent=2))
        return
    summarise(result, outputs, say, said)


def run_saved(request, outputs, bar, stop):
    """The run with its checkpoint beside the output; of one that diverges the estimate before that is written."""
    from invdiff.files import sweep
    from invdiff.output import save_last
    from invdiff.runner import reconstruct as run

    for path in (outputs.checkpoint, outputs.volume):
        sweep(path)
    try:
        return run(replace(request, checkpoint=outputs.checkpoint), bar, stop)
    except NumericalError as error:
        if error.volume is None:
            raise
        path = save_last(error.volume, outputs)
        raise NumericalError(f"{error}; the estimate before it is in {show(path)}") from None


def gather_request(input: Path | None, op: str | None, given: dict):
    """The request of the command line; names are checked before anything heavy is imported."""
    from invdiff.errors import choose
    from invdiff.operators import OPERATORS
    from invdiff.solvers import SOLVERS

    if op is not None:
        choose(op, OPERATORS, "operator")
    elif input is None:
        raise UsageError("say what to reconstruct: --op ct-sparse runs the built-in example")
    for name in (given["solver"], *given["compare"]):
        choose(name, SOLVERS, "solver")
    parts = ("solver", "operator", "prior")
    solver_settings, operator_settings, prior_settings = split_settings(given["settings"], parts)
    operator = gather_operator(op, given, operator_settings)
    batch = slice_batch(given["slice_batch"])

    from invdiff.runner import Request

    keep = ("solver", "prior", "simulate", "reference", "steps", "samples", "seed", "slices", "slice_axis", "device")
    return Request(
        input=input,
        op=op,
        operator=operator,
        solver_options=solver_settings,
        prior_options=prior_settings,
        slice_batch=batch,
        compare=given["compare"] or None,
        resume=given["resume"],
        checkpoint_minutes=given["checkpoint_minutes"],
        **{k: given[k] for k in (*keep, "coupling", "nan", "volume_index", "series", "accept", "allow_shear")},
        **{k: given[k] for k in ("noise", "noise_level")},
    )


def pick_outputs(request, output: Path | None, overwrite: bool):
    """Where the result goes, checked before the run: OUTPUT, or ``invdiff-OP.nii.gz`` with the next free number.

    To resume without OUTPUT is to go on with the last numbered run that left a checkpoint.

    Raises:
        UsageError: the output exists, or a checkpoint that neither ``resume`` nor ``overwrite`` allows for.
    """
    from invdiff.destination import check_output, next_free_name
    from invdiff.formats import WRITES, check_writer
    from invdiff.operators import OPERATORS

    if output is None:
        from invdiff.measurement_file import operator_name

        op = request.op or operator_name(request.input)
        stem = f"invdiff-{op if op in OPERATORS else 'reconstruction'}"
        output = next_free_name(Path.cwd(), stem, unfinished=request.resume)
    notes = check_writer(output)
    inputs = [p for p in (request.input, request.reference) if p is not None]
    outputs = check_output(output, overwrite, inputs, suffixes=WRITES)
    if not (request.resume or overwrite) and outputs.checkpoint.exists():
        raise UsageError(
            f"{show(outputs.checkpoint)}: an unfinished run left it; pass --resume to go on with it, or --overwrite to "
            "start anew"
        )
    return replace(outputs, notes=(*outputs.notes, *notes))


def slice_batch(text: str) -> int | None:
    """``auto`` or a positive whole number."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--slice-batch takes auto or a positive whole number, got '{text}'")
    return int(text)


def summarise(result, outputs, say, said) -> None:
    """The table that ends a run, with the warnings that were not ``said`` while it ran."""
    say(result.record["case"])
    for name, figures in result.metrics.items():
        run = result.record["runs"][name]
        error = f"RMSE {figures['rmse']:.4g}"
        if "rmse_body_hu" in figures:
            error = f"RMSE in the body {figures['rmse_body_hu']:6.1f} HU"
        say(
            f"  {name:8} PSNR {figures['psnr_db']:6.2f} dB   SSIM {figures['ssim'] or float('nan'):.3f}   {error}   "
            f"chi2 {run['chi2_per_datum']:.2f}   {run['seconds']:.0f} s"
        )
    if result.metrics:
        say(f"  (PSNR: {next(iter(result.metrics.values()))['convention']['psnr_db']})")
    for warning in result.record["warnings"]:
        if warning not in said:
            say(f"warning: {warning}")
    say(f"wrote {outputs.volume.name}, {outputs.manifest.name}, {outputs.picture.name} in {outputs.volume.parent}")
    say("research use only, not for diagnosis")


class Bar:
    """Progress: one line that is rewritten on a terminal, a line per tenth elsewhere."""

    def __init__(self, say):
        self.say, self.tty, self.start, self.name, self.tenth = (
            say,
            sys.stdout is not None and sys.stdout.isatty(),
            0.0,
            "",
            -1,
        )

    def __call__(self, name: str, step: int, steps: int, info: dict) -> None:
        if name != self.name:
            self.name, self.start, self.tenth = name, time.monotonic(), -1
        done = step >= steps or info.get("finished", False)
        elapsed = time.monotonic() - self.start
        if self.tty:
            end = "\n" if done else ""
            click.echo(f"\r{name:6} step {step}/{steps}  {elapsed:5.0f} s", nl=False)
            click.echo(end, nl=False)
        elif done or 10 * step // steps > self.tenth:
            self.tenth = 10 * step // steps
            self.say(f"{name:6} step {step}/{steps}  {elapsed:5.0f} s")
