"""The command ``invdiff``: one file per command, imported when it is called, so that ``--help`` is instant."""

if __name__ != "invdiff.cli":
    raise ImportError("import invdiff.cli, not cli")

import os
import sys
from importlib import import_module

import click

from invdiff import __version__
from invdiff.errors import InvdiffError, is_out_of_memory
from invdiff.files import show

COMMANDS = {
    "reconstruct": ("invdiff.cli.reconstruct", "Reconstruct a volume from few measurements."),
    "simulate": ("invdiff.cli.simulate", "Measure a volume: write a measurement file."),
    "evaluate": ("invdiff.cli.evaluate", "Compare a reconstruction with a reference."),
    "operators": ("invdiff.cli.tables", "List the forward operators and their options."),
    "solvers": ("invdiff.cli.tables", "List the solvers and their options."),
    "priors": ("invdiff.cli.priors", "List, inspect, import and train priors."),
}


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported when first used."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return getattr(import_module(COMMANDS[name][0]), name)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(self, ctx, args):
        if args and args[0] not in COMMANDS:
            raise click.UsageError(f"unknown command '{args[0]}': choose one of {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="invdiff %(version)s (research use only, not for diagnosis)")
def invdiff():
    """Medical volumes from too few measurements, with pretrained 2D diffusion priors.

    \b
    invdiff reconstruct --op ct-sparse
    invdiff reconstruct scan.nii.gz --op ct-sparse --views 30 --simulate -o result.nii.gz

    Research use only, not for diagnosis.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors are one line on stderr, the exit code tells their kind.

    0 ok, 1 a mistake of invdiff itself, 2 usage, 3 bad input, 4 bad prior, 5 resources, 6 numerical failure,
    130 interrupted. With INVDIFF_TRACEBACK set, errors that nobody foresaw show where they happened.
    """
    args = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        sys.exit(invdiff.main(args=args, prog_name="invdiff", standalone_mode=False) or 0)
    except BrokenPipeError:  # the reader of stdout has gone, as with `| head`
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error)
        if code == 1 and os.environ.get("INVDIFF_TRACEBACK"):
            raise
    click.echo(f"invdiff: error: {show(' '.join(message.split()))}", err=True)
    sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an error that ended a command."""
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if isinstance(error, InvdiffError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130, "interrupted; nothing was written over"
    text = str(error)
    if is_out_of_memory(error):
        remedy = "use fewer slices (--slices A:B), a smaller --slice-batch, in a training smaller stages"
        return 5, f"out of memory: {remedy}"
    if isinstance(error, OSError):
        return 5, f"{text}; check paths, permissions and free space"
    what = f"{type(error).__name__}: {text[:200]}"
    return 1, f"mistake in invdiff ({what}); report it with the output of INVDIFF_TRACEBACK=1"
