"""Commands that tell what is in a file: inspect, verify."""

from __future__ import annotations

import click

from omni_convert.convert.cli.output import print_lines, quieten_hub
from omni_convert.convert.progress_bar import progress_bar

__all__ = ["inspect_command", "verify_command"]


@click.command("inspect")
@click.argument("model", metavar="PATH")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(model: str, revision: str | None, as_json: bool) -> None:
    """Show what is inside the model at PATH.

    Every quantized layer, and what runtimes would do with the model; no weight is read.
    """
    quieten_hub(hide_bars=True)
    from omni_convert.convert.inspection.contents import inspect_source, inspection_report
    from omni_convert.convert.source.location import resolve_source

    source = resolve_source(model, revision, stream=True)
    print_lines(inspection_report(source, inspect_source(source), as_json=as_json))


@click.command("verify")
@click.argument("model", metavar="PATH")
@click.option("--reference", metavar="MODEL", help="The model it was made of; every layer is compared with it.")
@click.option("--revision", help="Branch, tag or commit on the Hub, of PATH.")
@click.option("--quiet", is_flag=True, help="Only the exit status.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def verify_command(model: str, reference: str | None, revision: str | None, quiet: bool, as_json: bool) -> None:
    """Check every value and name of the model at PATH.

    Whatever tool quantized it. Exit status 1 if a runtime would fail with it or compute something else, 0 else.
    """
    quieten_hub(hide_bars=quiet or as_json)
    from omni_convert.convert.inspection.verification import verify_source, weight_bytes
    from omni_convert.convert.inspection.verification_report import count_of, verification_report
    from omni_convert.convert.source.location import resolve_source

    source = resolve_source(model, revision)
    original = resolve_source(reference) if reference is not None else None
    with progress_bar("verifying", weight_bytes(source), hidden=quiet) as advance:
        components = verify_source(source, original, advance)
    if as_json or not quiet:
        print_lines(verification_report(source.path, components, as_json=as_json))
    if count_of(components, "error"):
        click.get_current_context().exit(1)
