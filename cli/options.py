"""Options shared by commands, and their conversion."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from invdiff.errors import UsageError
from invdiff.priors.flags import number


class Place(click.Path):
    """A path; an empty one, of a shell variable that is not set say, is not the current folder."""

    def convert(self, value, param, ctx):
        if value == "":
            self.fail("is empty; name a path ('.' for the current folder)", param, ctx)
        return super().convert(value, param, ctx)


class Range(click.ParamType):
    """``A:B`` with whole numbers A < B."""

    name = "A:B"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            a, b = (int(part) for part in value.split(":"))
        except ValueError:
            self.fail(f"'{value}' is not A:B with two whole numbers, e.g. 10:20", param, ctx)
        if not 0 <= a < b:
            self.fail(f"'{value}' needs 0 <= A < B", param, ctx)
        return a, b


def operator_options(command):
    """``--views`` and the other options of the operator table; only those that were given reach the operator."""
    for option in reversed(
        (
            click.option("--views", type=click.IntRange(1), help="CT: number of views.  [default: 60; by operator]"),
            click.option("--arc", type=float, metavar="DEG", help="ct-limited: angle covered.  [default: 90]"),
            click.option("--photons", type=float, help="CT: photons per ray of a simulation.  [default: 1e5]"),
            click.option(
                "--geometry", type=click.Choice(["parallel", "fan", "cone"]), help="CT: beam.  [default: parallel]"
            ),
            click.option("--sod", type=float, metavar="MM", help="Fan, cone: source to axis.  [default: 2 diagonals]"),
            click.option("--sdd", type=float, metavar="MM", help="Fan, cone: source to detector.  [default: 1.8 sod]"),
            click.option("--detector-shape", type=click.Choice(["flat", "curved"]), help="Fan.  [default: flat]"),
            click.option("--detector-pitch", type=float, metavar="MM", help="CT: detector pitch.  [default: pixel]"),
            click.option("--detector-count", type=click.IntRange(1), help="CT: detector elements per view."),
            click.option("--detector-offset", type=float, metavar="MM", help="CT: shift of the detector along itself."),
            click.option("--axis-offset", type=float, metavar="MM", help="CT: axis of rotation off the midline."),
            click.option("--detector-rows", type=click.IntRange(1), help="Cone: detector rows.  [default: enough]"),
            click.option("--detector-row-pitch", type=float, metavar="MM", help="Cone: row pitch.  [default: a slice]"),
            click.option("--kernel", metavar="KERNEL", help="blur: gaussian[3d]:SIGMA, motion:LENGTH:ANGLE, FILE."),
            click.option("--mask", metavar="MASK", help="inpaint: random:FRACTION, box:SIZE, stripes:WIDTH or FILE."),
            click.option("--factor", type=click.IntRange(1), help="sr: fine pixels per coarse one.  [default: 2]"),
            click.option("--filter", type=click.Choice(["average", "bicubic", "gaussian"]), help="sr: down-sampling."),
            click.option("--axis", type=click.Choice(["inplane", "through-plane"]), help="sr: which pixels are large."),
            click.option("--acceleration", type=float, help="MRI: numbers of k-space per measured one.  [default: 4]"),
            click.option(
                "--center-fraction", type=float, help="MRI: share in the middle, all measured.  [default: .08]"
            ),
            click.option("--pattern", metavar="NAME", help="MRI: equispaced, random, gaussian or poisson."),
            click.option("--coils", type=click.IntRange(1), help="MRI: simulated coils.  [default: 8; radial 1]"),
            click.option("--spokes", type=click.IntRange(1), help="mri-radial: number of spokes.  [default: 64]"),
            click.option("--trajectory", metavar="NAME", help="mri-radial: radial, golden, spiral or FILE.npy."),
        )
    ):
        command = option(command)
    return command


def input_options(command):
    """``--series`` and ``--accept``: what to do with folders and files that hold more or less than one even stack."""
    accept = click.Choice(["gaps", "duplicates", "mixed"])
    what = "DICOM: repair what is refused otherwise; repeatable."
    command = click.option("--accept", type=accept, multiple=True, help=what)(command)
    return click.option("--series", metavar="N|NAME", help="Which DICOM series, or array of an .npz.")(command)


def hush() -> None:
    """``--quiet``: nothing but errors, also from libraries."""
    warnings.simplefilter("ignore")
    logging.getLogger("invdiff").setLevel(logging.ERROR)


@contextmanager
def heard(say: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """Warnings of the package as the list that is yielded, so that a command that prints them all says none twice.

    Args:
        say: is given each ``warning: ...`` as it comes; None for nothing until the command prints them.
    """
    texts: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())
            if say is not None:
                say(f"warning: {texts[-1]}")

    listener = Listener()
    logging.getLogger("invdiff").addHandler(listener)
    try:
        yield texts
    finally:
        logging.getLogger("invdiff").removeHandler(listener)


_COMMON = ("views", "arc", "photons", "geometry", "detector_pitch", "detector_count", "detector_offset", "axis_offset")
_SCANNER = ("sod", "sdd", "detector_shape", "detector_rows", "detector_row_pitch")
_MRI = ("acceleration", "center_fraction", "pattern", "coils", "spokes", "trajectory")
OPERATOR_OPTIONS = (*_COMMON, *_SCANNER, *_MRI, "kernel", "mask", "factor", "filter", "axis")


def split_settings(settings: tuple[str, ...], parts: tuple[str, ...] = ("solver", "operator")) -> list[dict[str, str]]:
    """``--set PART.NAME=VALUE`` as a dictionary for each of ``parts``."""
    tables: dict[str, dict[str, str]] = {part: {} for part in parts}
    for text in settings:
        key, equals, value = text.partition("=")
        table, dot, name = key.partition(".")
        if not equals or not dot or table not in tables or not name:
            raise UsageError(f"--set '{text}': write {' or '.join(f'{part}.NAME=VALUE' for part in parts)}")
        tables[table][name] = value
    return list(tables.values())


def split_sampler_settings(settings: tuple[str, ...]) -> dict[str, str]:
    """``--set sampler.NAME=VALUE`` as a dictionary."""
    found = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key.startswith("sampler.") or not key.removeprefix("sampler."):
            raise UsageError(f"--set '{text}': write sampler.NAME=VALUE")
        found[key.removeprefix("sampler.")] = value
    return found


def numbers(option: str, text: str | None, kind, form: str, counts: tuple[int, ...]):
    """Positive numbers from "A,B", or None for None; as many as one of ``counts``."""
    if text is None:
        return None
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts or not all(0 < v < 1e6 for v in values):
        raise UsageError(f"{option} '{text[:40]}': write positive numbers {form}")
    return values


def gather_operator(op: str | None, given: dict, settings: dict[str, str]) -> dict:
    """Operator options from the command line; values of ``--set`` become numbers where they can."""
    options = {k: v for k, v in given.items() if k in OPERATOR_OPTIONS and v is not None}
    options |= {k: number(v) for k, v in settings.items()}
    if op is not None:
        from invdiff.operators import resolve

        resolve(op, **options)
    return options
