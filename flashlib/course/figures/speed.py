"""Figures of a recorded race: speed by length, ours against the best other, and the roofline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flashlib.course.display import Figure, format_number
from flashlib.course.figures import style
from flashlib.course.figures.charts import byte_axis, power_axis
from flashlib.measure.racing.cases import Case, short_labels
from flashlib.measure.records.record import Record

__all__ = ["memory_by_length", "protocol_by_length", "ratio_to_best", "roofline", "save_figures", "speed_by_length"]

# One color for each implementation in all figures. What makes the N x N matrix is gray; a dashed line is a twin.
_LINES = {
    "triton": (style.O, "o", "-"),
    "cpu": (style.O, "o", "-"),
    "torch_sdpa_cudnn": (style.Q, "s", "-"),
    "flex_attention": (style.V, "D", "-"),
    "torch_sdpa_flash": (style.K, "^", "-"),
    "triton_tutorial": (style.S, "v", "-"),
    "flash_attn_4": (style.INK, "P", "-"),
    "flash_attn_3": (style.INK, "X", "--"),
    "flash_attn_2": (style.K, "<", "--"),
    "torch_varlen": (style.K, ">", "--"),
    "torch_sdpa_efficient": (style.V, "h", "--"),
    "tiled": (style.O, "p", "--"),
    "naive": (style.LSE, "x", "-"),
    "naive_compiled": (style.LSE, "+", "--"),
    "torch_sdpa_math": (style.LSE, "1", ":"),
}
_OTHER = (style.SOFT_INK, ".", "-.")


def speed_by_length(record: Record) -> Figure:
    """FLOP/s over the length of the sequence: a panel for each direction, head dimension and mask, a line for each peer.

    Raises:
        ValueError: nothing in the record was timed.
    """
    scale, unit = _unit(record)
    return _by_length(record, "tflops", lambda rate: rate * scale, unit, "Speed")


def memory_by_length(record: Record) -> Figure:
    """Peak memory over the length of the sequence, both axes logarithmic.

    Raises:
        ValueError: the record holds no memory.
    """
    return _by_length(record, "peak_bytes", float, "peak memory", "Memory of forward and backward")


def protocol_by_length(record: Record) -> Figure:
    """Latency, tokens per second and peak memory over the length of the prompt: a row for each, a column for each batch, all logarithmic.

    Raises:
        ValueError: nothing in the record was timed.
    """
    rows = _measured(record, "ms")
    batches = sorted({row["batch"] for row in rows})
    columns = {"ms": "latency, P50 (ms)", "tokens_per_s": "tokens per second", "peak_bytes": "peak memory"}
    with style.canvas(height=7.2) as fig:
        axes = fig.subplots(len(columns), len(batches), squeeze=False, sharex=True, sharey="row")
        drawn: dict[str, object] = {}
        for down, (column, label) in zip(axes, columns.items(), strict=True):
            for ax, batch in zip(down, batches, strict=True):
                inside = [row for row in rows if row["batch"] == batch and row[column]]
                for peer in _order(inside):
                    points = sorted((row["length"], row[column]) for row in inside if row["peer"] == peer)
                    drawn[peer] = _draw(ax, peer, points)
                ax.set_yscale("log", base=2 if column == "peak_bytes" else 10)
                power_axis(ax, sorted({row["length"] for row in rows}))
                ax.grid(True)
                if column == "ms":
                    ax.set_title(f"batch of {batch}", fontsize=10)
            down[0].set_ylabel(label)
            if column == "peak_bytes":
                byte_axis(down[0].yaxis, log=True)
        peers = _order(rows)
        fig.legend([drawn[peer] for peer in peers], peers, loc="outside lower center", ncols=4)
        fig.suptitle("Short, middle and long prompts", x=0.01, ha="left", fontweight="bold", fontsize=11)
        _source(fig, record)
        told = "; ".join(
            f"batch of {batch}: {min((row for row in rows if row['batch'] == batch and row['length'] == longest), key=lambda row: row['ms'])['peer']} is fastest at {longest:,} tokens"
            for batch in batches
            for longest in [max(row["length"] for row in rows if row["batch"] == batch)]
        )
        return Figure(fig, alt=f"Latency, tokens per second and peak memory by prompt length. {told}. {record.label}.")


def _by_length(record: Record, column: str, value: Callable[[float], float], ylabel: str, title: str) -> Figure:
    rows = _measured(record, column)
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with style.canvas(height=1.1 + 2.5 * down) as fig:
        axes = fig.subplots(down, across, squeeze=False, sharex=True, sharey="row")
        drawn: dict[str, object] = {}
        for ax, panel in zip(axes.flat, panels, strict=False):
            inside = [row for row in rows if _panel(row) == panel]
            for peer in _order(inside):
                points = sorted((row["length"], value(row[column])) for row in inside if row["peer"] == peer)
                drawn[peer] = _draw(ax, peer, points)
            ax.set_title(panel, fontsize=10)
            ax.grid(True)
            power_axis(ax, sorted({row["length"] for row in rows}))
            if column == "peak_bytes":
                ax.set_yscale("log", base=2)
                byte_axis(ax.yaxis, log=True)
            else:
                ax.set_ylim(bottom=0)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        fig.supylabel(ylabel, fontsize=10)
        peers = _order(rows)
        fig.legend([drawn[peer] for peer in peers], peers, loc="outside lower center", ncols=4)
        fig.suptitle(f"{title} by sequence length S", x=0.01, ha="left", fontweight="bold", fontsize=11)
        _source(fig, record)
        told = "; ".join(f"{panel}: {_leader(rows, panel, column)}" for panel in panels)
        return Figure(fig, alt=f"{title} over sequence length, {ylabel}. {told}. {record.label}.")


def ratio_to_best(record: Record, peer: str = "triton") -> Figure:
    """How fast one peer is, with the fastest of the others in each case as 1.

    Raises:
        ValueError: the peer was timed in no case together with another.
    """
    ratios = ratios_to_best(record, peer)
    if not ratios:
        raise ValueError(f"{peer} was timed in no case together with another peer")
    with style.canvas(height=0.9 + 0.24 * len(ratios)) as fig:
        ax = fig.add_subplot()
        for at, (_, best, ratio) in enumerate(ratios):
            color = _LINES.get(best, _OTHER)[0]
            ax.plot([1, ratio], [at, at], color=style.RULE, linewidth=4, zorder=1)
            ax.plot(ratio, at, marker="o", color=style.O, markersize=7, zorder=2)
            ax.annotate(f"{ratio:.2f}", (ratio, at), xytext=(8 if ratio >= 1 else -8, 0), textcoords="offset points",
                        va="center", ha="left" if ratio >= 1 else "right", fontsize=8.5)  # fmt: skip
            ax.annotate(best, (1.01, at), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=color)
        ax.axvline(1, color=style.INK, linewidth=1.2)
        ax.set_yticks(range(len(ratios)), [label for label, _, _ in ratios])
        ax.invert_yaxis()
        ax.margins(x=0.14)
        ax.set(xlabel="speed, as a multiple of the fastest other (named at the right)")
        ax.set_title(f"{peer} against the fastest other")
        _source(fig, record)
        told = "; ".join(f"{label}: {ratio:.2f} of {best}" for label, best, ratio in ratios)
        return Figure(fig, alt=f"Speed of {peer} as a multiple of the fastest other. {told}. {record.label}.")


def ratios_to_best(record: Record, peer: str = "triton") -> list[tuple[str, str, float]]:
    """(case, fastest other, speed as a multiple of it) for each case in which the peer and another were timed."""
    cases: dict[Case, dict[str, float]] = {}
    for row in record.rows:
        if row.get("tflops"):
            cases.setdefault(Case.from_columns(row), {})[row["peer"]] = row["tflops"]
    labels, _ = short_labels(cases)
    ratios = []
    for case, rates in cases.items():
        others = {name: rate for name, rate in rates.items() if name != peer}
        if peer in rates and others:
            best = max(others, key=others.get)
            ratios.append((labels[case], best, rates[peer] / others[best]))
    return ratios


def roofline(record: Record) -> Figure:
    """FLOP/s over arithmetic intensity, under the two ceilings that were measured in the same run.

    The intensity is the least one: each operand moved once.

    Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".

    Raises:
        ValueError: nothing in the record was timed.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows, (scale, unit) = _measured(record, "tflops"), _unit(record)
    matmul, stream = (record.extra[name] / 1e12 * scale for name in ("matmul_flops_per_s", "stream_bytes_per_s"))
    points = {peer: [(_intensity(row), row["tflops"] * scale) for row in rows if row["peer"] == peer] for peer in _order(rows)}  # fmt: skip
    everywhere = [x for line in points.values() for x, _ in line]
    low, high = min([*everywhere, matmul / stream]) / 4, max(everywhere) * 2
    with style.canvas(height=4.2) as fig:
        ax = fig.add_subplot()
        ax.plot([low, matmul / stream, high], [low * stream, matmul, matmul], color=style.INK, linewidth=1.6)
        ax.annotate(f"matrix product: {format_number(matmul)}", (high, matmul), xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
        ax.annotate(
            f"memory: {format_number(record.extra['stream_bytes_per_s'] / 1e9)} GB/s", (low, low * stream),
            xytext=(2, -8), textcoords="offset points", fontsize=9, va="top",
        )  # fmt: skip
        for above, (peer, line) in enumerate(points.items()):
            color, marker, _ = _LINES.get(peer, _OTHER)
            ax.plot(
                *zip(*line, strict=True), color=color, marker=marker, linestyle="", label=peer, zorder=9 - above / 9
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
        ax.set(xlabel="arithmetic intensity (FLOP per byte, each operand moved once)", ylabel=unit)
        ax.grid(True, which="major")
        ax.set_title("Roofline")
        fig.legend(loc="outside lower center", ncols=4)
        _source(fig, record)
        best = max((rate / matmul, peer) for peer, line in points.items() for _, rate in line)
        alt = (
            f"Roofline: a matrix product reaches {format_number(matmul)} {unit}, memory "
            f"{format_number(record.extra['stream_bytes_per_s'] / 1e9)} GB/s. The nearest to the first is {best[1]} with "
            f"{best[0]:.0%}. {record.label}."
        )
        return Figure(fig, alt=alt)


def save_figures(record: Record, folder: Path) -> list[Path]:
    """Draw what the record holds, as ``<folder>/<topic>_<figure>.png``; the paths."""
    if any("cache" in row for row in record.rows):
        drawn = {}  # of decoding; a table tells it
    elif any("tokens_per_s" in row for row in record.rows):
        drawn = {"by_length": protocol_by_length(record)}
    elif any(row.get("peak_bytes") for row in record.rows):
        drawn = {"memory": memory_by_length(record)}
    elif any(row.get("tflops") for row in record.rows):
        drawn = {"speed": speed_by_length(record), "roofline": roofline(record)}
        if ratios_to_best(record):
            drawn["ratio"] = ratio_to_best(record)
    else:
        drawn = {}
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{record.topic}_{name}.png")
        figure.save(str(paths[-1]))
    return paths


def _panel(row: dict) -> str:
    shared = "" if row["q_heads"] == row["kv_heads"] else f", {row['q_heads'] // row['kv_heads']} heads to a KV head"
    return f"{row['direction']}, {row['mask']}, D {row['head_dim']}{shared}"


def _measured(record: Record, column: str) -> list[dict]:
    rows = [row for row in record.rows if row.get(column)]
    if not rows:
        raise ValueError(f"no row of {record.topic!r} has a value of {column!r}")
    return rows


def _intensity(row: dict) -> float:
    case = Case.from_columns(row)
    return case.flops / case.bytes


def _unit(record: Record) -> tuple[float, str]:
    """From TFLOP/s to what can be read, and its name."""
    return (1.0, "TFLOP/s") if record.extra["device"] == "cuda" else (1e3, "GFLOP/s")


def _order(rows: list[dict]) -> list[str]:
    """Peers in the order of the legend: ours first."""
    there = {row["peer"] for row in rows}
    return [peer for peer in _LINES if peer in there] + sorted(there - set(_LINES))


def _draw(ax, peer: str, points: list[tuple[float, float]]):
    color, marker, line = _LINES.get(peer, _OTHER)
    width, size = (2.6, 6) if peer == "triton" else (1.4, 4.5)
    (drawn,) = ax.plot(
        *zip(*points, strict=True), color=color, marker=marker, linestyle=line, linewidth=width, markersize=size
    )
    return drawn


def _leader(rows: list[dict], panel: str, column: str) -> str:
    """Who is best at the longest sequence of a panel."""
    inside = [row for row in rows if _panel(row) == panel]
    longest = max(row["length"] for row in inside)
    best = (min if column == "peak_bytes" else max)(
        (row for row in inside if row["length"] == longest), key=lambda row: row[column]
    )
    return f"at S {longest}, {best['peer']} leads"


def _source(fig, record: Record) -> None:
    fig.supxlabel(record.label, x=0.995, ha="right", fontsize=8.5, color=style.SOFT_INK, style="italic")
