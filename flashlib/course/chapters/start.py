"""What chapter 00 shows: this machine in a few lines, and the map of the course."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashlib.course.display import Table, format_bytes, table

PARTS = {"I": "The algorithm", "II": "Kernels", "III": "Inference", "IV": "Systems"}


@dataclass(frozen=True)
class Chapter:
    """One chapter: the two digits its notebook begins with, its part, its title, and what one can say after it."""

    number: str
    part: str
    title: str
    gives: str


CHAPTERS = (
    Chapter("00", "I", "Start here", "what this machine can run, and how a chapter works"),
    Chapter("01", "I", "Naive attention and the memory wall", "what softmax(QKᵀ)V computes, moves, and where it ends"),
    Chapter("02", "I", "Softmax, one block at a time", "why one pass is enough, and how partial results merge"),
    Chapter("03", "I", "Tiling", "how the N x N matrix goes away, and what that saves"),
    Chapter("04", "I", "Masks", "which tiles a mask skips, and what a row without keys returns"),
    Chapter("05", "I", "Heads, positions and the KV cache", "what GQA, RoPE and a cache cost, while a model writes"),
    Chapter("06", "II", "First Triton kernels", "how a GPU program is written in Python"),
    Chapter("07", "II", "FlashAttention in Triton", "how the tiles become one kernel"),
    Chapter(
        "08", "II", "Masks, autotuning and machine code", "what the compiler made of it, and which tile is fastest"
    ),
    Chapter("09", "II", "Backward", "how gradients come without storing the weights"),
    Chapter("10", "II", "On a CPU", "how the same algorithm uses vectors, threads and caches"),
    Chapter("11", "II", "Hopper: from Triton to Gluon", "what the fastest kernels do that a plain one does not"),
    Chapter("12", "III", "Split-KV decoding", "how one query keeps a whole GPU busy"),
    Chapter("13", "III", "Paged caches and ragged batches", "how a server stores what its users said"),
    Chapter("14", "III", "KV injection and shared prefixes", "how foreign keys and values enter a model"),
    Chapter("15", "IV", "Counting FLOPs and bytes", "how long a kernel should take, before it is written"),
    Chapter("16", "IV", "Profiling and choosing", "which implementation to use, and how to know"),
    Chapter("17", "IV", "Many GPUs", "how attention spans several devices"),
    Chapter("18", "IV", "Claims, checked", "which widespread statements about attention hold"),
    Chapter("19", "IV", "Capstone", "how a model runs on attention of your own"),
)


def course_map(folder: str | Path = ".") -> Table:
    """All chapters, and which of them are in `folder`, the directory of the notebooks."""
    numbers = {path.name[:2] for path in Path(folder).glob("[0-9][0-9]_*.ipynb")}
    rows, part = [], None
    for chapter in CHAPTERS:
        name = f"{chapter.part} {PARTS[chapter.part]}" if chapter.part != part else None
        part = chapter.part
        here = "here" if chapter.number in numbers else "to come"
        rows.append((name, chapter.number, chapter.title, chapter.gives, here))
    found = sum(chapter.number in numbers for chapter in CHAPTERS)
    notes = [f"{found} of {len(CHAPTERS)} chapters are here."]
    return table(rows, ["part", "", "chapter", "after it you can say", ""], notes=notes)


def machine_table() -> Table:
    """This machine in a few lines. `flashlib doctor`, in a terminal, tells more."""
    from flashlib.course.weights import find_weights
    from flashlib.doctor import examine

    found = examine(find_weights())
    gpus = ", ".join(f"{gpu.name} ({format_bytes(gpu.memory)})" for gpu in found.gpus)
    runs = [name for name, missing in found.backends.items() if missing is None]
    rows = [
        ("Python, PyTorch", f"{found.system['python']}, {found.packages['torch']}"),
        ("CPU", f"{found.cpu}, {found.logical_cores} threads"),
        ("memory", format_bytes(found.memory)),
        ("GPU", gpus or "none; Part I needs none"),
        ("backends of attention", ", ".join(runs)),
        ("weights of SmolLM2", "here" if found.weights else "not yet: `flashlib weights` brings them"),
    ]
    return table(rows, ["", "this machine"])
