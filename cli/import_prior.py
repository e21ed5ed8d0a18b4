"""``invdiff priors info`` and ``invdiff priors import``: checkpoints of other packages."""

from pathlib import Path

import click

from invdiff.cli.options import Place


def _options(command):
    """What a file does not say about itself; the same for both commands."""
    for option in reversed(
        (
            click.option(
                "--config",
                multiple=True,
                type=Place(path_type=Path),
                help="JSON, plain YAML, flags or Python settings of its training; repeatable, later ones win.  "
                "[default: FILE's name with .json, .yaml or .py]",
            ),
            click.option(
                "--format", "architecture", help="Its architecture; an unknown one lists them.  [default: found]"
            ),
            click.option(
                "--part", help="Where in the file the weights are, e.g. model.  [default: averaged ones first]"
            ),
            click.option(
                "--allow", multiple=True, help="A type besides tensors that may be in it, as the refusal says."
            ),
            click.option(
                "--trust-pickle",
                is_flag=True,
                help="FILE holds more than tensors (EDM's .pkl, whole modules) and is from a source that you trust: "
                "take its weights out in a process of its own, where no class of it is built and no code of it is run.",
            ),
            click.option("--class", "label", type=click.IntRange(0), help="Class of a network conditioned on classes."),
            click.option("--range", "seen", metavar="LOW,HIGH", help="Values it was trained on.  [default: -1,1]"),
            click.option(
                "--prior-range",
                metavar="LOW,HIGH",
                help="What these are for solvers: -1 and 1 are -1000 and 1000 HU, or 0 and the 99.5th percentile.  "
                "[default: -1,1; complex images: -2,2]",
            ),
            click.option("--modality", type=click.Choice(["any", "CT", "MR"]), default="any", show_default=True),
            click.option(
                "--size",
                type=click.IntRange(8, 65536),
                help="Side of its images; larger slices go in tiles.  [default: as configured]",
            ),
            click.option("--precision", default="float32", show_default=True, help="float32, float16 or bfloat16."),
            click.option("--no-check", is_flag=True, help="Take a network that does not denoise a test image."),
        )
    ):
        command = option(command)
    return command


def _chosen(config, seen, prior_range, no_check, precision, **rest):
    from invdiff.errors import choose
    from invdiff.priors.build import PRECISIONS
    from invdiff.priors.foreign import ImportOptions

    choose(precision, PRECISIONS, "precision")
    return ImportOptions(
        config=tuple(config),
        network_range=_ends("--range", seen),
        prior_range=_ends("--prior-range", prior_range),
        precision=precision,
        check=not no_check,
        **rest,
    )


def _ends(option, text):
    """Two numbers, or None for None."""
    from invdiff.errors import UsageError

    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} '{text[:40]}': write two numbers LOW,HIGH, e.g. 0,1") from None
    return low, high


def _lines(foreign):
    """What is known of a foreign prior, a line each."""
    card, tensors = foreign.card, foreign.checkpoint.tensors
    count = sum(t.numel() for t in tensors.values())
    yield "architecture", card["architecture"]
    yield "parameters", f"{count / 1e6:.3f} million in {len(tensors)} tensors"
    from invdiff.priors.parametrization import Convention

    seen = {"network_range": Convention.network_range} | card["convention"]
    for part, values in (card | {"convention": seen}).items():
        for key, value in values.items() if part in ("network", "convention", "info", "source") else ():
            yield f"{part}.{key}", str(value)[:200]


@click.command()
@click.argument("file", type=Place(path_type=Path))
@_options
def info(file, **options):
    """Say what the checkpoint FILE (or folder of diffusers) is, without loading it into a network.

    \b
    invdiff priors info ffhq_10m.pt
    invdiff priors info knee.pt --config fastmri_knee_320_complex.yml
    """
    from invdiff.priors.foreign import open_foreign

    for name, value in _lines(open_foreign(file, _chosen(**options))):
        click.echo(f"{name:24} {value}")


@click.command("import")
@click.argument("file", type=Place(path_type=Path))
@click.option("-o", "--output", required=True, type=Place(path_type=Path), help="Folder of the safe form.")
@click.option("--overwrite", is_flag=True, help="Replace a prior in that folder.")
@_options
def import_(file, output, overwrite, **options):
    """Write the safe form of the checkpoint FILE (or folder of diffusers): model.safetensors and config.json.

    The folder is what '--prior' takes. Nothing in FILE is ever executed.

    \b
    invdiff priors import ffhq_10m.pt -o priors/ffhq
    invdiff priors import aapm.pt --config AAPM256.yml --range 0,1 --modality CT -o priors/aapm
    """
    from invdiff.priors.foreign import import_prior

    foreign = import_prior(file, output, _chosen(**options), overwrite)
    for name, value in _lines(foreign):
        click.echo(f"{name:24} {value}")
    click.echo(f"written to {output}; use it with --prior {output}")
