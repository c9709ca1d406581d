"""The files that records of our attention depend on."""

from __future__ import annotations

from pathlib import Path

from flashlib.measure.records.record import PACKAGE

__all__ = ["cpu_sources", "decode_sources", "kernel_sources", "launching_sources"]

# What only decoding runs.
DECODING = ("kernels/combine.py", "kernels/decode.py", "launch/decode.py")


# How launches are handed to the driver: what it costs the host, and nothing that a GPU does.
LAUNCHING = (
    *(
        f"launch/{name}.py"
        for name in ("checks", "counters", "engines", "folding", "forms", "packets", "plans", "recipes")
    ),
    "launch/packets.c",
)


def kernel_sources() -> list[str]:
    """Files that decide how fast our attention is, as :func:`flashlib.measure.records.record.sources_hash` takes them."""
    rooms = ("kernels", "kernels/hopper", "launch")
    others = {
        *(f"{room}/__init__.py" for room in rooms),
        "launch/inspect.py",
        "launch/operators.py",
        *DECODING,
        *LAUNCHING,
    }
    found = [path.relative_to(PACKAGE) for room in rooms for path in (PACKAGE / room).glob("*.py")]
    return sorted({*map(Path.as_posix, found), "backends/triton.py"} - others)


def launching_sources() -> list[str]:
    """Files between a call and its launches, by which what comes out is decided as well, and how long the host takes."""
    return sorted(["attention.py", "engines.py", "routes.py", "spec.py", "masks.py", *LAUNCHING])


def cpu_sources(*, decoding: bool = False) -> list[str]:
    """The same for attention on a CPU, or for decoding there."""
    kernels = [path for path in (PACKAGE / "kernels" / "cpu").iterdir() if path.suffix in (".h", ".cpp")]
    found = [*kernels, *(PACKAGE / "launch" / "cpu").glob("*.py"), PACKAGE / "backends" / "cpu.py"]
    return sorted(
        [
            *(str(path.relative_to(PACKAGE)) for path in found),
            *(["inference/decode.py", "inference/decode_problem.py"] if decoding else []),
        ]
    )


def decode_sources() -> list[str]:
    """The same for decoding."""
    shared = ("kernels/bundles.py", "kernels/common.py", "launch/options.py", "launch/start.py", "launch/tiles.py")
    return sorted([*DECODING, *shared, "inference/decode.py", "inference/decode_problem.py"])
