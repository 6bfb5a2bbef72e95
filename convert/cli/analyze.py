"""The command that tells what each format costs in each layer: analyze."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from omni_convert.convert.cli.options import (
    calibration_options,
    formats_option,
    memory_option,
    recipe_of,
    report_option,
)
from omni_convert.convert.cli.output import announce_demo, command_line, print_lines, silence_libraries
from omni_convert.formats.dialects.table import WRITTEN
from omni_convert.formats.errors import CalibrationError, OutputError

__all__ = ["analyze_command"]


@click.command("analyze")
@click.argument("model", required=False)
@click.option("-m", "--method", default="fp8", show_default=True, help="As of convert: gguf chooses among its types.")
@click.option("--dialect", type=click.Choice(WRITTEN), default="vllm-omni", show_default=True)
@formats_option
@click.option("--calib", type=click.Path(path_type=Path), help="Prompts to calibrate on.")
@click.option(
    "--calibration", type=click.Path(path_type=Path), multiple=True, help="Statistics of calibrate --sensitivity."
)
@calibration_options
@memory_option
@click.option("-o", "--output", type=click.Path(path_type=Path), default="analysis.json", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier file.")
@report_option
@click.option("--quiet", is_flag=True, help="Print only errors.")
def analyze_command(model: str | None, output: Path, report_file: Path | None, quiet: bool, **options: Any) -> None:
    """Tell what each format costs in each layer of MODEL.

    Prints which layers spoil the images most and which budgets are worth their bytes. Stores the table, which convert
    --analysis reuses; statistics that are recorded go beside it, into a file that ends in .safetensors.
    """
    recipe = recipe_of(model, {"ignored_layers": (), "component": (), **options})
    from omni_convert.convert.calibration.recording import record_source
    from omni_convert.convert.output.manifest import write_json
    from omni_convert.convert.precision.advice import analysis_lines
    from omni_convert.convert.precision.analysis import analyze
    from omni_convert.convert.precision.mixture import bytes_beside
    from omni_convert.convert.progress_bar import progress_bar
    from omni_convert.convert.source.location import DEMO_PROMPTS, resolve_source
    from omni_convert.formats.statistics.statistics import Statistics

    recorded = output.with_suffix(".safetensors")
    for path in (output, recorded) if recipe.calib is not None or not recipe.calibration else (output,):
        if path.exists() and not recipe.overwrite:
            raise OutputError(f"{path}: file exists; use --overwrite, or name another --output")
    if not recipe.is_calibrated:
        if model is not None:
            raise CalibrationError(
                "--calib: found no prompts, expected a file of them, or --calibration FILE of `omni-convert calibrate "
                "--sensitivity`"
            )
        recipe = replace(recipe, calib=DEMO_PROMPTS)
    announce_demo(model, "analyzing", quiet=quiet)
    silence_libraries()
    source = resolve_source(model, recipe.revision)
    if recipe.calibration:
        statistics = Statistics.load_all(recipe.calibration)
    else:
        statistics = record_source(source, recipe, with_sensitivity=True).statistics
        statistics.save(recorded)
    with progress_bar("analyzing", None, hidden=quiet) as advance:
        analysis = analyze(source, recipe, statistics, advance)
    write_json(output, analysis.to_json())
    others = bytes_beside(source, recipe, analysis)
    if report_file is not None:
        from omni_convert.convert.page.document import write_page
        from omni_convert.convert.page.pages import analysis_page

        write_page(report_file, analysis_page(analysis, statistics, others, command_line()))
    if not quiet:
        print_lines(analysis_lines(analysis, others=others))
        click.echo(f"{output}: {len(analysis.units)} choices of {', '.join(recipe.mixed_formats)}")
