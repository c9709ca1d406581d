"""Recorded results: figures with the device, the versions, the commit and the sources they were taken from.

A figure without its origin is a rumor. A record holds both, and knows when the code it measured has changed since: it is then
*stale*, and whoever shows it says so.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

__all__ = ["BENCHMARKS", "Record", "load_record", "save_record", "sources_hash"]

PACKAGE = Path(__file__).resolve().parents[2]
BENCHMARKS = PACKAGE.parent / "benchmarks"


@dataclass(frozen=True)
class Record:
    """One recorded measurement.

    Attributes:
        topic: what was measured; also the file name, ``benchmarks/<device folder>/<topic>.json``.
        rows: the figures, one dict per line of a table. Units are in the column names (``ms``, ``bytes``).
        device: name of the GPU or CPU. date: ISO date (UTC). commit: of this repository.
        versions: of Python, torch, triton, CUDA and the driver.
        sources: package-relative files the figures depend on. sources_hash: of their contents when measured.
        notes: how it was measured, in words.
    """

    topic: str
    rows: list[dict]
    device: str
    date: str
    commit: str
    versions: dict[str, str]
    sources: list[str]
    sources_hash: str
    notes: str = ""
    extra: dict = field(default_factory=dict)

    @property
    def stale(self) -> bool:
        """Whether the measured code has changed since, or is no longer where it was."""
        there = all((PACKAGE / name).is_file() for name in self.sources)
        return not there or sources_hash(self.sources) != self.sources_hash

    @property
    def label(self) -> str:
        """Where the figures come from, for a caption."""
        warning = "; STALE: the code has changed since" if self.stale else ""
        return f"recorded on {self.device}, {self.date}, torch {self.versions['torch']}{warning}"

    def select(self, **wanted) -> list[dict]:
        """The rows whose columns have these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]


def source_text(name: str) -> str:
    """The text of a package file."""
    return (PACKAGE / name).read_text(encoding="utf-8")


def sources_hash(sources: Iterable[str], read: Callable[[str], str] = source_text) -> str:
    """SHA-256 over what package files say to Python (paths relative to ``flashlib/``), however they are laid out.

    Comments, docstrings, line breaks, brackets that change nothing, quotes and trailing commas do not count. Of C++, comments and blanks
    do not.

    Args:
        read: gives the text of a file; by default that of today.
    """
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(name.encode())
        text = read(name)
        digest.update((_code_alone(text) if name.endswith(".py") else _cpp_alone(text)).encode())
    return digest.hexdigest()


def _cpp_alone(text: str) -> str:
    """The words of C++ of our own, without comments, which all begin with ``//``."""
    return " ".join(word for line in text.splitlines() for word in line.partition("//")[0].split())


def _code_alone(text: str) -> str:
    """The syntax tree of Python source without docstrings, written down; the same under every version of Python."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        elif isinstance(node, ast.JoinedStr):  # to some releases of Python an f-string ends with an empty text
            node.values = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    return _written(tree)


_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _written(part: ast.AST | list | object) -> str:
    """`ast.dump` by fixed rules: its own choice of the empty fields to show differs between versions of Python."""
    if isinstance(part, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(part) if value is not None and value != [])
        return f"{type(part).__name__}({', '.join(f'{name}={_written(value)}' for name, value in fields)})"
    if isinstance(part, list):
        return f"[{', '.join(map(_written, part))}]"
    return ascii(part)


def new_record(topic: str, rows: list[dict], sources: Iterable[str], notes: str = "", **extra) -> Record:
    """A record of figures just taken on this machine."""
    return Record(
        topic=topic,
        rows=rows,
        device=device_name(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        commit=_commit(),
        versions=_versions(),
        sources=sorted(sources),
        sources_hash=sources_hash(sources),
        notes=notes,
        extra=extra,
    )


def save_record(record: Record, folder: Path) -> Path:
    """Write ``<folder>/<topic>.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.topic}.json"
    path.write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load_record(name: str, folder: Path = BENCHMARKS) -> Record:
    """Read ``benchmarks/<name>.json``, for instance ``load_record("h200/memory_wall")``.

    Raises:
        FileNotFoundError: there is no such record; lists those there are.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        known = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.json"))
        raise FileNotFoundError(f"there is no record {name!r}; there are: {', '.join(known) or 'none'}")
    return Record(**json.loads(path.read_text(encoding="utf-8")))


def device_name() -> str:
    """The GPU that ``torch.cuda`` uses, else the processor architecture."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def _commit() -> str:
    if os.environ.get("FLASHLIB_COMMIT"):  # a machine that was sent the files without their history
        return os.environ["FLASHLIB_COMMIT"]
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = "not installed"
    if torch.cuda.is_available():
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["driver"] = _driver()
    return versions


def _driver() -> str:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.split("\n")[0].strip() or "unknown"
