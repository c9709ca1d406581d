"""`flashlib cost`: what a step of a model will take, without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def cost(
    model: Annotated[
        str, typer.Option(help="A model by name, or the path of a Hugging Face config.json.")
    ] = "llama-3-8b",
    phase: Annotated[str, typer.Option(help="prefill, decode, chunked or speculative.")] = "decode",
    batch: Annotated[int, typer.Option(help="Requests.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each, new ones included.")] = 8192,
    gpu: Annotated[str, typer.Option(help="A GPU or CPU by name; here: measure this machine.")] = "h200",
    chunk: Annotated[int, typer.Option(help="chunked: tokens of the prompt that is being read.")] = 512,
    drafted: Annotated[int, typer.Option(help="speculative: tokens that were guessed.")] = 4,
    dtype: Annotated[str, typer.Option(help="In which products are formed: bf16, fp16, fp32, fp8.")] = "bf16",
    weights: Annotated[str, typer.Option(help="How weights are stored, if otherwise: fp8, int8, int4, mxfp4.")] = "",
    cache: Annotated[str, typer.Option(help="How the KV cache is stored, if otherwise: fp8, int8, int4.")] = "",
    tensor: Annotated[int, typer.Option(help="Devices that share heads and weights.")] = 1,
    sequence: Annotated[int, typer.Option(help="Devices that share tokens, and exchange them for heads.")] = 1,
    context_parallel: Annotated[int, typer.Option(help="Devices that share rows; keys pass round.")] = 1,
    parallel: Annotated[
        str, typer.Option(help="Attention alone, over devices: ring=N, all_to_all=N, gather=N, hybrid=RxN.")
    ] = "",
    link: Annotated[
        str, typer.Option(help="With --parallel: what joins devices: nvlink4, nvlink5, pcie5.")
    ] = "nvlink4",
    network: Annotated[
        str, typer.Option(help="With --parallel: what joins nodes of 8: ethernet400, ethernet100.")
    ] = "ethernet400",
    page_size: Annotated[int, typer.Option(help="Keys of a page of the cache; 0 for a contiguous one.")] = 0,
    absorb: Annotated[bool, typer.Option(help="With MLA: decode in the latent space.")] = True,
    compare: Annotated[str, typer.Option(help="Further devices and models, by name, with commas.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw the parts under the roofs into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    known: Annotated[bool, typer.Option("--list", help="Name the models and devices that are known.")] = False,
) -> None:
    """Predict what a step of a language model costs: time, tokens/s, energy, memory, and what it waits for.

    For example: flashlib cost --model llama-3-8b --phase decode --batch 64 --context 32768 --gpu h200
    """
    from flashlib.cost import links, report
    from flashlib.cost.devices import device, device_names, this_machine
    from flashlib.cost.models import model as model_by_name
    from flashlib.cost.models import model_names
    from flashlib.cost.parallel import Parallel
    from flashlib.cost.steps import step_of

    if known:
        typer.echo(f"models: {', '.join(model_names())}\ndevices: {', '.join(device_names())}, here")
        return
    if parallel:
        try:
            found_links = links.of_model(
                model_by_name(model), parallel, context, batch, device(gpu), link, network, dtype
            )
        except ValueError as error:
            typer.echo(f"flashlib cost: {error}", err=True)
            raise typer.Exit(1) from error
        typer.echo(json.dumps(found_links.to_dict(), indent=1) if as_json else found_links.text())
        return
    try:
        step = step_of(phase, batch, context, chunk=chunk, drafted=drafted)
        shared = Parallel(tensor, sequence, context_parallel)

        def ask(model: str, gpu: str) -> report.Report:
            target = this_machine() if gpu == "here" else device(gpu)
            options: dict[str, Any] = {
                "dtype": dtype,
                "weights": weights,
                "cache": cache,
                "page_size": page_size or None,
                "latent": absorb,
            }
            return report.report(model_by_name(model), step, target, parallel=shared, **options)

        first = ask(model, gpu)
        others = [name for name in compare.split(",") if name]
        found = [first, *(ask(model, name) if name in (*device_names(), "here") else ask(name, gpu) for name in others)]
        if plot is not None:
            first.plot(plot)
    except ValueError as error:
        typer.echo(f"flashlib cost: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        told = [one.to_dict() for one in found]
        typer.echo(json.dumps(told if others else told[0], indent=1))
    elif others:
        typer.echo(f"{first.title}\n\n{report.compare(found)}")
    else:
        typer.echo(f"{first.title}\n\n{first.table()}")
    if plot is not None:
        typer.echo(plot, err=True)
