"""The command line; torch is imported only when a command needs it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click
from click_default_group import DefaultGroup

from omni_convert.convert.cli.analyze import analyze_command
from omni_convert.convert.cli.convert import convert_command, dequantize_command, push_command
from omni_convert.convert.cli.inspect import inspect_command, verify_command
from omni_convert.convert.cli.run import calibrate_command, compare_command, generate_command
from omni_convert.formats.errors import OmniConvertError, nearest

__all__ = ["main"]

# diffusers imports torchao where it is installed; these loggers then report features that nobody asked for.
NEEDLESS_WARNINGS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")
# A word that is less similar to a command may be the name of a model.
COMMAND_SIMILARITY = 0.75


class _Group(DefaultGroup):  # type: ignore[misc]  # click-default-group has no types
    """Reports errors of the user as one line with exit status 1, and an interruption with status 130."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not Path(name).exists():
            meant = nearest(name, self.commands, COMMAND_SIMILARITY)
            if meant is not None:
                ctx.fail(f"No such command or model '{name}'. Did you mean '{meant}'?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OmniConvertError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Error: interrupted", err=True)
            ctx.exit(130)


@click.group(
    cls=_Group, default="convert", default_if_no_args=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="omni-convert")
@click.option("-v", "--verbose", is_flag=True, help="Log each step.")
def main(verbose: bool) -> None:
    """Quantize diffusion pipelines offline, and run the result.

    `omni-convert MODEL -m fp8` is short for `omni-convert convert MODEL -m fp8`. Without MODEL the bundled demo
    pipeline is converted.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    for name in () if verbose else NEEDLESS_WARNINGS:
        logging.getLogger(name).setLevel(logging.ERROR)


for command in (
    convert_command,
    dequantize_command,
    inspect_command,
    verify_command,
    push_command,
    calibrate_command,
    analyze_command,
    generate_command,
    compare_command,
):
    main.add_command(command)
