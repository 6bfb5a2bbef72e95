"""Commands that examine a model: inspect, verify."""

from __future__ import annotations

from pathlib import Path

import click

from omni_convert.convert.cli.options import report_option
from omni_convert.convert.cli.output import command_line, print_lines, quieten_hub
from omni_convert.convert.progress_bar import progress_bar

__all__ = ["inspect_command", "verify_command"]


@click.command("inspect")
@click.argument("model", metavar="PATH")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(model: str, revision: str | None, as_json: bool) -> None:
    """Show what is inside the model at PATH.

    Lists every quantized layer, and which runtimes load the model. No weight is read.
    """
    quieten_hub(hide_bars=True)
    from omni_convert.convert.inspection.contents import inspect_source, inspection_report
    from omni_convert.convert.source.location import resolve_source

    source = resolve_source(model, revision, stream=True)
    print_lines(inspection_report(source, inspect_source(source), as_json=as_json))


@click.command("verify")
@click.argument("model", metavar="PATH")
@click.option("--reference", metavar="MODEL", help="The original model; every layer is compared with it.")
@click.option("--revision", help="Branch, tag or commit of PATH on the Hub.")
@report_option
@click.option("--quiet", is_flag=True, help="Only the exit status.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def verify_command(
    model: str, reference: str | None, revision: str | None, report_file: Path | None, quiet: bool, as_json: bool
) -> None:
    """Check every value and name of the model at PATH.

    The model may come from any tool. The exit status is 1 if a runtime would fail or compute wrong results with it,
    and 0 otherwise.
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
    if report_file is not None:
        from omni_convert.convert.page.document import write_page
        from omni_convert.convert.page.pages import verification_page

        write_page(report_file, verification_page(source.short_name, components, command_line()))
    if count_of(components, "error"):
        click.get_current_context().exit(1)
