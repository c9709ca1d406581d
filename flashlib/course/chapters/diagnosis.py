"""What hardware counters say of a kernel: how busy each unit was, and which hypothesis about its time that refutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashlib.cost.devices import Device
from flashlib.measure.records.tables import Table, table

__all__ = ["BUSY", "HYPOTHESES", "Diagnosis", "diagnose", "told"]

BUSY = 0.75  # of its peak: from here on a unit is taken for what binds
# What might bind, by name, in words.
HYPOTHESES = {
    "memory": "it waits for bytes from memory",
    "tensor cores": "it waits for products",
    "exponentials": "it waits for exponentials",
    "products and exponentials": "it waits for one of the two all the time, as each waits for the other",
    "latency": "no unit is busy: too few programs, or each waits for itself",
}


@dataclass(frozen=True)
class Diagnosis:
    """Of one call.

    Attributes:
        shares: of its peak, by unit: how busy memory, tensor cores and exponentials were, and the sum of the last two.
        binds: of :data:`HYPOTHESES`, what the counters leave.
        waits: for what its warps waited most, and how many of them while one instruction was issued.
    """

    shares: dict[str, float]
    binds: str
    waits: tuple[str, float]

    def refutes(self, hypothesis: str) -> bool:
        """Whether the counters speak against a hypothesis: the unit was less busy than :data:`BUSY`, or another one was not.

        Raises:
            ValueError: there is no such hypothesis.
        """
        if hypothesis not in HYPOTHESES:
            raise ValueError(f"hypothesis must be one of {', '.join(HYPOTHESES)}; got {hypothesis!r}")
        if hypothesis == "latency":
            return self.binds != "latency"
        return self.shares[hypothesis] < BUSY


def diagnose(row: Mapping, device: Device) -> Diagnosis:
    """Of a row that ``flashlib bench --counters`` recorded."""
    memory = (row["dram_read"] + row["dram_written"]) / row["seconds"] / device.read_bytes_per_s
    tensor, exponentials = row["tensor_pipe"], row["exponential_unit"]
    shares = {"memory": memory, "tensor cores": tensor, "exponentials": exponentials, "products and exponentials": tensor + exponentials}  # fmt: skip
    binds = next((name for name, share in shares.items() if share >= BUSY), "latency")
    waits = max(
        ((name, warps) for name, warps in row["stalls"].items() if name != "selected"), key=lambda stall: stall[1]
    )
    return Diagnosis(shares, binds, waits)


def told(rows: Mapping[str, Mapping], device: Device) -> Table:
    """A line for each call, by name."""
    found = {name: diagnose(row, device) for name, row in rows.items()}
    lines = [
        (name, f"{1e3 * rows[name]['seconds']:.3g}", *(f"{one.shares[unit]:.0%}" for unit in ("memory", "tensor cores", "exponentials")), f"{one.waits[0]}: {one.waits[1]:.1f}")
        for name, one in found.items()
    ]  # fmt: skip
    return table(lines, ["call", "ms", "memory", "tensor cores", "exponentials", "warps wait most for"])
