"""``invdiff operators`` and ``invdiff solvers``: the tables with options and defaults."""

from dataclasses import fields

import click

from invdiff.cli.show_operator import show


@click.group(invoke_without_command=True)
@click.pass_context
def operators(ctx):
    """List the forward operators with their options, defaults and units, or show one."""
    if ctx.invoked_subcommand is not None:
        return
    from invdiff.operators import OPERATORS

    for name, entry in OPERATORS.items():
        click.echo(f"{name}: {entry.summary}")
        for option, (default, text) in entry.options.items():
            value = f"{default:g}" if isinstance(default, float) else default
            shown = "" if default is None else f"  [default: {value}]"
            click.echo(f"    {option:16} {text}{shown}")


operators.add_command(show)


@click.command()
def solvers():
    """List the solvers with their options and defaults (set with --set solver.NAME=VALUE)."""
    from invdiff.solvers import SOLVERS, solver_class

    for name, entry in SOLVERS.items():
        solver = solver_class(name)()
        click.echo(f"{name}: {entry.summary}  [steps: {solver.default_steps}]")
        options = ", ".join(f"{f.name}={getattr(solver, f.name)}" for f in fields(solver))  # type: ignore[arg-type]
        click.echo(f"    {options}")
