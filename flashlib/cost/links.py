"""Attention over many devices, on paper: bytes each sends, how long links take for them, and where adding devices stops paying.

Nothing here was measured on more than one device. Compute is taken at the rate of :meth:`flashlib.cost.Device.sustained`, links at their data sheets' rate; both
are never reached. What such figures are good for is which term wins, and by how much it would have to be wrong before another one does.

    from flashlib import cost

    problem = cost.Problem.causal(1, 32, 8, 2**17, 2**17, 128)
    cost.shared_step(problem, "ring", 8, cost.device("h200"), cost.link("nvlink4")).efficiency
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashlib.cost.counts import Problem, formula
from flashlib.cost.devices import Device
from flashlib.cost.parallel import Parallel
from flashlib.cost.visible import checked_count
from flashlib.measure.records.tables import Table, format_bytes, format_number, table

__all__ = ["LINKS", "METHODS", "Link", "SharedStep", "link", "parse_method", "scaling", "scaling_table", "shared_step"]

METHODS = ("ring", "all_to_all", "hybrid", "gather")
NODE = 8  # devices that NVLink joins; beyond them there is a network
BACKWARD = 2.5  # products of a backward pass over those of a forward: five to two (FlashAttention-2, arXiv 2307.08691, section 4.1)
PAYS = 0.5  # a device that does less than half of what it could does not pay
SIZES = tuple(2**n for n in range(1, 13))


@dataclass(frozen=True)
class Link:
    """What joins devices.

    Attributes:
        name, title: as on the command line, and in words.
        bytes_per_s: out of one device, one direction. latency: seconds until the first byte of a message is there; assumed.
        source: of the rate.
    """

    name: str
    title: str
    bytes_per_s: float
    latency: float
    source: str


LINKS = {
    found.name: found
    for found in (
        Link("nvlink4", "NVLink 4", 450e9, 5e-6, "H100 data sheet: 900 GB/s in both directions together"),
        Link("nvlink5", "NVLink 5", 900e9, 5e-6, "B200 data sheet: 1.8 TB/s in both directions together"),
        Link("pcie5", "PCIe 5.0 x16", 64e9, 10e-6, "PCI-SIG: 32 GT/s, 16 lanes"),
        Link("ethernet400", "400 Gbit/s Ethernet, one port for each device", 50e9, 20e-6, "IEEE 802.3bs"),
        Link("ethernet100", "100 Gbit/s Ethernet, one port for each device", 12.5e9, 20e-6, "IEEE 802.3bm"),
    )
}


def link(name: str) -> Link:
    """A link by name.

    Raises:
        ValueError: it is not known; lists those that are.
    """
    if name not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}; got {name!r}")
    return LINKS[name]


@dataclass(frozen=True)
class SharedStep:
    """Forward and backward of one attention call, shared by devices. All of the device that has most to do.

    Attributes:
        method, devices: how, and by how many.
        alone: seconds that one device would take for all of it.
        compute: seconds of products. exchange: seconds of links.
        seconds: of both, as far as one hides the other: a ring's keys are on their way while others are used, but for the first;
            tokens are exchanged for heads before and after, and nothing is hidden.
        sent: bytes that one device sends, on average, forward and backward.
        imbalance: the most work of a device over the mean.
    """

    method: str
    devices: int
    alone: float
    compute: float
    exchange: float
    seconds: float
    sent: float
    imbalance: float

    @property
    def speedup(self) -> float:
        return self.alone / self.seconds

    @property
    def efficiency(self) -> float:
        return self.speedup / self.devices


def parse_method(text: str) -> tuple[str, int, int]:
    """``"ring=8"``, ``"all_to_all=8"``, ``"gather=4"``, or ``"hybrid=4x8"``, rings of 4 of teams of 8: method, ring, team.

    Raises:
        ValueError: it is none of these.
    """
    name, _, sizes = text.partition("=")
    ring, _, team = sizes.partition("x")
    wrong = f"parallel must be ring=N, all_to_all=N, gather=N or hybrid=RxN; got {text!r}"
    if name not in METHODS or not ring.isdigit() or (team.isdigit() if name != "hybrid" else not team.isdigit()):
        raise ValueError(wrong)
    if name == "hybrid":
        counts = int(ring), int(team)
    elif team:
        raise ValueError(wrong)
    else:
        counts = (1, int(ring)) if name == "all_to_all" else (int(ring), 1)
    for count in counts:
        checked_count("parallel", count, 1)
    return name, *counts


def shared_step(
    problem: Problem, method: str, ring: int, device: Device, joined: Link, *, team: int = 1, order: str = "zigzag", across: Link | None = None
) -> SharedStep:  # fmt: skip
    """What one call would cost, forward and backward.

    Args:
        method: of :data:`METHODS`. ring, team: devices in a ring, and that exchange heads; one of them is 1 but for "hybrid".
        joined: the link inside of a team or, without teams, of the ring. across: of the ring of teams; the same unless given.

    Raises:
        ValueError: heads or rows cannot be shared so.
    """
    across = across or joined
    shared = Parallel(sequence=team, context=ring, order=order).share(problem)
    rate = device.sustained(problem.dtype)
    alone = formula(problem).products * (1 + BACKWARD) / rate
    compute = max(work.products for work in shared.per_device) * (1 + BACKWARD) / rate
    inside, between = Parallel(sequence=team), Parallel(sequence=team, context=ring, order=order)
    tokens = 1 / ring  # of the whole, that a team has
    swapped = (inside.sent(problem) + inside.sent_backward(problem)) * tokens
    swap = swapped / joined.bytes_per_s + 4 * joined.latency * (team > 1)
    most, mean = max(between.received(problem)), sum(between.received(problem)) / ring
    heads = between.heads(problem.q_heads, problem.kv_heads)[1]
    passed = 3 * between.batch_bytes(problem, 0, mean * heads)
    passing = 3 * between.batch_bytes(problem, 0, most * heads) / across.bytes_per_s + 3 * (ring - 1) * across.latency
    if ring == 1:
        passed = passing = 0.0
    if method == "gather":
        seconds = compute + passing + swap
    else:
        seconds = max(compute, passing) + (passing / max(1, ring - 1) if compute > passing else compute / ring) + swap
    return SharedStep(method, ring * team, alone, compute, swap + passing, seconds, swapped + passed, shared.imbalance)


def scaling(
    problem: Problem, device: Device, joined: Link, across: Link, *, sizes: Sequence[int] = SIZES, order: str = "zigzag"
) -> list[SharedStep | tuple[str, int, str]]:
    """Each method over ever more devices; where one cannot be, why. Up to :data:`NODE` of them are joined by ``joined``, more of them by ``across``."""
    found: list[SharedStep | tuple[str, int, str]] = []
    for method in METHODS[:3]:
        for size in sizes:
            if method == "hybrid":
                team = min(NODE, size // 2)
                if size < 4:
                    continue
                shape = {"ring": size // team, "team": team}
            else:
                shape = {"ring": size, "team": 1} if method == "ring" else {"ring": 1, "team": size}
            wire = joined if size <= NODE or method == "hybrid" else across
            try:
                found.append(
                    shared_step(
                        problem, method, shape["ring"], device, wire, team=shape["team"], order=order,
                        across=across if size > NODE else joined,
                    )
                )  # fmt: skip
            except ValueError as error:
                found.append((method, size, str(error)))
    return found


def scaling_table(found: Sequence[SharedStep | tuple[str, int, str]], title: str) -> Table:
    """One line for each number of devices, one group of columns for each method."""
    by: dict[tuple[str, int], SharedStep | str] = {}
    for one in found:
        key = (one.method, one.devices) if isinstance(one, SharedStep) else one[:2]
        by[key] = one if isinstance(one, SharedStep) else one[2]
    methods = list(dict.fromkeys(method for method, _ in by))
    sizes = sorted({size for _, size in by})
    rows = []
    for size in sizes:
        row: list = [size]
        for method in methods:
            cell = by.get((method, size))
            if isinstance(cell, SharedStep):
                row += [f"{format_number(1e3 * cell.seconds)} ms", f"{cell.efficiency:.0%}", format_bytes(cell.sent)]
            else:
                row += ["cannot" if cell else "", "", ""]
        rows.append(row)
    headers = ["devices", *(head for method in methods for head in (method, "of ideal", "sent"))]
    return table(rows, headers, notes=["", title, *_notes(by, methods, sizes)])


def stops_paying(found: Sequence[SharedStep | tuple[str, int, str]], method: str) -> int:
    """The most devices at which each still does half of what it would alone; 1 if there are none."""
    paying = [
        one.devices for one in found if isinstance(one, SharedStep) and one.method == method and one.efficiency >= PAYS
    ]
    return max(paying, default=1)


def _notes(by, methods, sizes) -> list[str]:
    lines = []
    for method in methods:
        steps = [one for one in by.values() if isinstance(one, SharedStep) and one.method == method]
        most = stops_paying(steps, method)
        beyond = [size for size in sizes if size > most]
        next_one = by.get((method, beyond[0])) if beyond else None
        if isinstance(next_one, str):
            reason = f"ends at {most:,} devices: {next_one}"
        elif isinstance(next_one, SharedStep):
            waits = "links" if next_one.exchange > next_one.compute else "uneven work"
            reason = f"pays up to {most:,} devices (each at {PAYS:.0%} or more of what it does alone); then it waits for {waits}"
        else:
            reason = f"pays up to {most:,} devices and more"
        lines.append(f"{method}: {reason}")
    return lines


@dataclass(frozen=True)
class Asked:
    """What ``flashlib cost --parallel`` was asked, and what was found.

    Attributes:
        title: what was asked, in words. chosen: by order of tokens. scaling: of all methods.
    """

    title: str
    chosen: dict[str, SharedStep]
    scaling: list[SharedStep | tuple[str, int, str]]

    def text(self) -> str:
        rows = [
            (
                order, one.devices, format_bytes(one.sent), 1e3 * one.compute, 1e3 * one.exchange, 1e3 * one.seconds,
                f"{one.efficiency:.0%}", f"{one.imbalance:.2f}",
            )
            for order, one in self.chosen.items()
        ]  # fmt: skip
        headers = [
            "tokens in order",
            "devices",
            "each sends",
            "products, ms",
            "links, ms",
            "together, ms",
            "of ideal",
            "most work / mean",
        ]
        said = "All of it on paper: products at the rate of a large matrix product, links at their data sheets' rate, latencies assumed."
        ask = scaling_table(self.scaling, "The same call over more devices, in zigzag order:")
        return f"{self.title}\n\n{table(rows, headers)}\n\n{ask}\n\n{said}"

    def to_dict(self) -> dict:
        def told(one: SharedStep) -> dict:
            return {**vars(one), "speedup": one.speedup, "efficiency": one.efficiency}

        return {
            "asked": self.title,
            "on_paper": True,
            "chosen": {order: told(one) for order, one in self.chosen.items()},
            "scaling": [
                told(one)
                if isinstance(one, SharedStep)
                else dict(zip(("method", "devices", "cannot"), one, strict=True))
                for one in self.scaling
            ],
            "stops_paying": {method: stops_paying(self.scaling, method) for method in METHODS[:3]},
        }


def of_model(
    model, text: str, context: int, batch: int, device: Device, joined: str, network: str, dtype: str
) -> Asked:
    """Forward and backward of one attention layer of a model over sequences of ``context`` tokens.

    Raises:
        ValueError: a name is not known, or heads or rows cannot be shared so.
    """
    method, ring, team = parse_method(text)
    inside, across = link(joined), link(network)
    sizes = (batch, model.q_heads, model.kv_heads, context, context, model.head_dim)
    problem = Problem.causal(*sizes, v_head_dim=model.v_head_dim, dtype=dtype)
    beyond = across if ring * team > NODE else inside
    wire = inside if method == "hybrid" else beyond
    orders = ("zigzag", "contiguous") if ring > 1 else ("zigzag",)
    chosen = {
        order: shared_step(problem, method, ring, device, wire, team=team, order=order, across=beyond)
        for order in orders
    }
    title = (
        f"{model.name}, one layer's causal attention, forward and backward: {batch:,} x {context:,} tokens, {dtype}, {text} on {device.title}; "
        f"{inside.title} among {NODE}, beyond them {across.title}"
    )
    return Asked(title, chosen, scaling(problem, device, inside, across))
