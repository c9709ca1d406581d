"""What :class:`flashlib.cost.StepCost` found, for a reader, for a program, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashlib.cost.conventions import CONVENTIONS, exact
from flashlib.cost.counts import Problem, paper_flops
from flashlib.cost.devices import Device
from flashlib.cost.models import MEMORY_KEPT, Model, max_batch, max_context
from flashlib.cost.parallel import Parallel
from flashlib.cost.steps import Step, StepCost
from flashlib.cost.visible import Visible
from flashlib.measure.records.tables import Table, format_bytes, format_number, table

__all__ = ["WAITS", "Report", "compare", "draw_roofs", "report"]

WAITS = {
    "memory": "memory",
    "power": "power cap",
    "tiles": "products, then exponentials",
    "latency": "starting kernels",
    "links": "links",
}


@dataclass(frozen=True)
class Report:
    """A step of a model on a device, with everything that was asked.

    Attributes:
        model, step, device, parallel: what was asked. dtype, weights, cache: as in :meth:`flashlib.cost.StepCost.of`.
        cost: what was found.
    """

    model: Model
    step: Step
    device: Device
    parallel: Parallel
    dtype: str
    weights: str
    cache: str
    cost: StepCost

    @property
    def title(self) -> str:
        many = self.parallel.devices
        where = f"one {self.device.title}" if many == 1 else f"{many} x {self.device.title}"
        groups = " and ".join(
            f"{group.count:,} x {group.new:,} new tokens at a context of {group.context:,}"
            for group in self.step.requests
        )
        return f"{self.model.name}, {self.step.phase}: {groups}; {where}, {self.dtype}"

    @property
    def context(self) -> int:
        return max(group.context for group in self.step.requests)

    @property
    def requests(self) -> int:
        return sum(group.count for group in self.step.requests)

    def memory(self) -> dict[str, float]:
        """Bytes on all devices, and what else would fit."""
        sizes: dict[str, Any] = {"dtype": self.weights, "cache_dtype": self.cache, "devices": self.parallel.devices}
        return {
            "available": self.device.memory_bytes * self.parallel.devices * (1 - MEMORY_KEPT),
            "weights": self.model.weight_bytes(self.weights),
            "kv_cache": self.requests * self.model.cache_bytes(self.context, dtype=self.cache),
            "max_batch": max_batch(self.model, self.device.memory_bytes, self.context, **sizes),
            "max_context": max_context(self.model, self.device.memory_bytes, self.requests, **sizes),
        }

    @property
    def fits(self) -> bool:
        memory = self.memory()
        return memory["weights"] + memory["kv_cache"] <= memory["available"]

    def counts(self) -> dict[str, dict[str, float]]:
        """FLOPs of the products of attention, all layers and devices, by ways of counting: of one device, and of all."""
        found: dict[str, dict[str, float]] = {}
        for layer in self.model.layers:
            for group in self.step.requests:
                left = None if layer.window is None else layer.window - 1
                mask = (Visible.band(group.new, group.context, left=left, right=0),)
                heads = (self.model.q_heads, self.model.kv_heads)
                problem = Problem(group.count, *heads, group.new, group.context, self.model.head_dim, self.model.v_head_dim, mask)  # fmt: skip
                ways = {"exact": exact(problem, self.parallel.devices), **{name: count(problem, self.parallel.devices) for name, count in CONVENTIONS.items()}}  # fmt: skip
                for name, counted in ways.items():
                    sums = found.setdefault(name, {"per_device": 0.0, "total": 0.0})
                    sums["per_device"] += counted.per_device
                    sums["total"] += counted.total
                papers = found.setdefault("papers", {"per_device": 0.0, "total": 0.0})
                papers["total"] += paper_flops(problem)
                papers["per_device"] += paper_flops(problem) / self.parallel.devices
        executed = self.cost.parts["attention"].work.products
        return {**found, "executed": {"per_device": executed, "total": executed * self.parallel.devices}}

    def to_dict(self) -> dict:
        """Everything, for a program. Seconds, bytes, FLOPs, joules; of one device unless a name says otherwise."""
        whole = self.cost.whole
        return {
            "model": self.model.name,
            "phase": self.step.phase,
            "requests": [asdict(group) for group in self.step.requests],
            "device": self.device.name,
            "parallel": asdict(self.parallel),
            "dtype": self.dtype,
            "weights_dtype": self.weights,
            "cache_dtype": self.cache,
            "seconds": self.cost.seconds,
            "uncertainty": whole.uncertainty,
            "tokens_per_s": self.cost.tokens_per_s,
            "outputs_per_s": self.cost.outputs / self.cost.seconds,
            "joules": self.cost.joules,
            "bound": whole.bound,
            "attention_share": self.cost.attention_share,
            "parts": {
                name: {
                    "seconds": part.seconds,
                    "bound": part.bound,
                    "roofs": dict(part.roofs),
                    "products": part.work.products,
                    "exponentials": part.work.exponentials,
                    "other": part.work.other,
                    "memory_bytes": part.memory,
                }
                for name, part in self.cost.parts.items()
            },
            "attention_flops": self.counts(),
            "memory": {**self.memory(), "fits": self.fits},
            "parameters": self.model.parameters,
            "active_parameters": self.model.active_parameters,
            "notes": list(self.cost.notes),
            "sources": {"device": self.device.source, "measured": self.device.measured.get("source", "")},
        }

    def table(self) -> Table:
        """For a reader."""
        cost, whole = self.cost, self.cost.whole
        rows = [_row(name, part, cost.seconds) for name, part in cost.parts.items()]
        rows.append(_row("whole step", whole, cost.seconds))
        headers = ["part", "ms", "share", "products", "exponentials", "memory", "waits for"]
        return table(rows, headers, notes=["", *self._told()])

    def _told(self) -> list[str]:
        cost, memory = self.cost, self.memory()
        low, high = (cost.seconds * (1 + sign * cost.whole.uncertainty) for sign in (-1, 1))
        energy = "power not known"
        if self.device.watts:
            joules, each = (format_number(found, digits=2) for found in (cost.joules, cost.joules / cost.tokens))
            energy = f"about {joules} J ({each} J a token)"
        counted = self.counts()
        ways = ", ".join(f"{name} {_flops(each['total'])}" for name, each in counted.items())
        fit = "fits" if self.fits else "does NOT fit"
        lines = [
            f"{format_number(1e3 * cost.seconds)} ms ({format_number(1e3 * low)} to {format_number(1e3 * high)}), "
            f"{format_number(cost.tokens_per_s)} tokens/s, {energy}",
            f"memory: weights {format_bytes(memory['weights'])} and KV cache {format_bytes(memory['kv_cache'])}; that {fit} into {format_bytes(memory['available'])}. "
            f"At most {memory['max_batch']:,} requests of {self.context:,} tokens, or {self.requests:,} of {memory['max_context']:,}",
            f"FLOPs of attention, all devices: {ways}",
        ]
        return [*lines, *cost.notes]

    def plot(self, path: Path) -> None:
        """The parts under the roofs: FLOP/s over FLOPs for each byte. Needs matplotlib (``pip install 'flashlib[course]'``).

        Raises:
            ValueError: the file's ending is none that matplotlib writes, or matplotlib is not installed.
        """
        try:
            import matplotlib

            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ValueError(f"plot needs matplotlib: pip install 'flashlib[course]' ({error})") from None
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        if path.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
            raise ValueError(
                f"plot must name a file that ends with one of {', '.join(sorted(figure.canvas.get_supported_filetypes()))}; got {path}"
            )
        draw(axes, self)
        figure.savefig(path)
        plt.close(figure)


def draw(axes, shown: Report) -> None:
    """The roofs of the device and the parts of the step, on log-log axes."""
    points = {
        name: (part.work.products / part.memory, part.work.products / part.seconds, part)
        for name, part in shown.cost.parts.items()
        if part.memory and part.work.products
    }
    pair = 2 * (shown.model.head_dim + shown.model.v_head_dim)
    draw_roofs(axes, shown.device, shown.dtype, pair, [(x, y) for x, y, _ in points.values()])
    for name, (x, y, part) in points.items():
        axes.scatter([x], [y], zorder=3, label=f"{name}: waits for {WAITS[part.bound]}")
    axes.set_title(shown.title, fontsize=9)
    axes.legend(loc="lower right", fontsize=8)


BINDING = {
    "memory": ("memory",),
    "power": ("power",),
    "tiles": ("products", "exponentials"),
    "latency": (),
    "links": (),
}


def draw_roofs(
    axes, device: Device, dtype: str, pair: int, points: Sequence[tuple[float, float]], bound: str | None = None
) -> None:
    """The roofs of a device on log-log axes, wide enough for some points: FLOP/s in products over products for each byte.

    Args:
        pair: FLOPs in products for each exponential, ``2 (D + Dv)``.
        points: to leave room for.
        bound: of an estimate (:attr:`flashlib.cost.Estimate.bound`); the roofs that bind are drawn thick. None for none.
    """
    read, ridge = device.read_bytes_per_s, device.sustained(dtype) / device.read_bytes_per_s
    low, high = min([*(x for x, _ in points), ridge / 30]) / 2, max([*(x for x, _ in points), ridge * 30]) * 2
    roofs = {
        "memory": (([low, high], [low * read, high * read]), "tab:blue", "-", "memory"),
        "products": (([low, high], [device.peak(dtype)] * 2), "tab:orange", "-", "tensor cores, data sheet"),
        "exponentials": (([low, high], [device.exponentials_per_s * pair] * 2), "tab:green", ":", f"exponentials, one for {pair} FLOPs"),
        "power": (([low, high], [device.sustained(dtype)] * 2), "tab:red", "--", "power cap (a large product)"),
    }  # fmt: skip
    binding = BINDING[bound] if bound else ()
    for name, (line, color, style, label) in roofs.items():
        axes.plot(*line, color=color, linestyle=style, label=label, linewidth=4 if name in binding else 1.5)
    lowest = min([*(y for _, y in points), low * read])
    highest = max(device.peak(dtype), device.exponentials_per_s * pair)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(lowest / 3, 2 * highest))
    axes.set(xlabel="FLOPs in products for each byte from memory", ylabel="TFLOP/s in products")
    axes.xaxis.set_major_formatter(lambda value, _: format_number(value))
    axes.yaxis.set_major_formatter(lambda value, _: format_number(value / 1e12))


def report(
    model: Model, step: Step, device: Device, *, dtype: str = "bf16", weights: str = "", cache: str = "",
    parallel: Parallel | None = None, page_size: int | None = None, latent: bool = True,
) -> Report:  # fmt: skip
    """A report; arguments as in :meth:`flashlib.cost.StepCost.of`."""
    parallel = parallel or Parallel()
    found = StepCost.of(model, step, device, dtype=dtype, weights=weights, cache=cache, parallel=parallel, page_size=page_size, latent=latent)  # fmt: skip
    return Report(model, step, device, parallel, dtype, weights or dtype, cache or dtype, found)


def compare(reports: list[Report]) -> Table:
    """Several reports, a line for each."""
    rows = []
    for one in reports:
        memory, cost = one.memory(), one.cost
        rows.append(
            (
                one.model.name, one.device.name, 1e3 * cost.seconds, f"±{cost.whole.uncertainty:.0%}", round(cost.tokens_per_s), cost.joules / cost.tokens if one.device.watts else None,
                f"{cost.attention_share:.0%}", WAITS[cost.whole.bound], "yes" if one.fits else "no", memory["max_batch"],
            )
        )  # fmt: skip
    headers = ["model", "device", "ms", "", "tokens/s", "J/token", "attention", "waits for", "fits", "max batch"]
    return table(rows, headers)


def _row(name: str, part, seconds: float) -> tuple:
    work = part.work
    return (
        name, 1e3 * part.seconds, f"{part.seconds / seconds:.0%}", _flops(work.products), _flops(work.exponentials, ""),
        format_bytes(part.memory) if part.memory else "", WAITS[part.bound],
    )  # fmt: skip


def _flops(count: float, unit: str = "FLOP") -> str:
    """A count in the unit that fits."""
    if not count:
        return ""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{format_number(count / size)} {prefix}{unit}"
    return f"{format_number(float(count))} {unit}".rstrip()
