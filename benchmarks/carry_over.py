"""Carry records of GPU times over a change of the kernels' sources that has left their machine code as it was. No GPU is needed.

    python benchmarks/carry_over.py BASE "arguments of device code travel in bundles"

BASE is a revision of git, the one before the change: a record must have been fresh there. It is carried over if

* every digest of benchmarks/machine_code is found again, compiled by the version of Triton that the record was taken with
  (benchmarks/machine_code.py says how to have two), and
* nothing else that it depends on has changed since BASE: of its sources only device code, and elsewhere the modules that names are
  imported from; and, if benchmarks/launch_digests.py finds that random problems still launch the same, what makes the launches.

Device code that has moved is followed by git's similarity, and what it imports is taken along. The reason goes into the record's notes.
"""

from __future__ import annotations

import argparse
import ast
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

from launch_digests import PROBLEMS, compare
from machine_code import compiled, differences, kept, table

from flashlib.measure.records.record import (
    BENCHMARKS,
    PACKAGE,
    Record,
    load_record,
    save_record,
    source_text,
    sources_hash,
)

Read = Callable[[str], str]


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the revision before the change")
    parser.add_argument("change", help="what has changed, in words for the records' notes")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    records = {path: load_record(path.relative_to(BENCHMARKS).with_suffix("")) for path in BENCHMARKS.rglob("*.json")}
    records = {path: record for path, record in records.items() if record.stale and fresh_at(options.base, record)}
    of_this_triton = {
        path: record for path, record in records.items() if record.versions["triton"] == triton.__version__
    }
    for path in sorted(records.keys() - of_this_triton.keys()):
        print(f"{path.name}: taken with triton {records[path].versions['triton']}, and this is {triton.__version__}")
    if not of_this_triton:
        sys.exit("no record to carry over")
    found = compiled(processes=options.processes)
    differing = differences(kept(), found, complete=True)
    if differing:
        sys.exit("\n".join(["machine code is not what it was, so no record is carried over", *differing]))
    proof = f"all {len(found)} digests of {table().relative_to(BENCHMARKS.parent)} are the same"
    seed = random.SystemRandom().getrandbits(30)
    launches_differ = compare(options.base, seed)
    print(*launches_differ[:5], sep="\n")
    if not launches_differ:
        proof += f", and {PROBLEMS} random problems launch the same (seed {seed})"
    for path, record in sorted(of_this_triton.items()):
        changed = changed_besides_kernels(record, read_at(options.base))
        if not launches_differ:
            changed = [name for name in changed if not makes_launches(name)]
        if changed:
            print(f"{path.name}: not carried over, since there are changes in {', '.join(changed)}")
            continue
        sources = sources_today(record, renamed(options.base))
        notes = f"{record.notes} Carried over from commit {record.commit} when {options.change}: {proof}."
        save_record(replace(record, sources=sources, sources_hash=sources_hash(sources), notes=notes), path.parent)
        print(f"{path.name}: carried over")


def fresh_at(base: str, record: Record) -> bool:
    try:
        return sources_hash(record.sources, read_at(base)) == record.sources_hash
    except FileNotFoundError:
        return False


def read_at(base: str) -> Read:
    """Reads files of the package as they were at a revision."""

    def read(name: str) -> str:
        command = ["git", "show", f"{base}:./{name}"]
        shown = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=False)
        if shown.returncode:
            raise FileNotFoundError(f"{name} at {base}: {shown.stderr.strip()}")
        return shown.stdout

    return read


def is_device_code(name: str) -> bool:
    return name.startswith("kernels/") and name.endswith(".py")


def makes_launches(name: str) -> bool:
    """Whether a file says no more of a GPU's work than which launches it is made of."""
    return name.startswith("launch/") or name in (
        "backends/triton.py",
        "inference/decode.py",
        "inference/decode_problem.py",
        "kernels/inspect.py",
    )


def changed_besides_kernels(record: Record, before: Read, now: Read = source_text) -> list[str]:
    """The sources of a record other than device code that say something else than before, but for where names are imported from."""

    def without_imports(read: Read) -> Read:
        return lambda name: _without_imports(read(name)) if name.endswith(".py") else read(name)

    changed = []
    for name in filter(lambda name: not is_device_code(name), record.sources):
        try:
            same = sources_hash([name], without_imports(before)) == sources_hash([name], without_imports(now))
        except FileNotFoundError:
            same = False
        if not same:
            changed.append(name)
    return changed


def _without_imports(text: str) -> str:
    """Python without its import statements, and in the end the names that they bind."""
    tree, bound = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            imports = [line for line in body if isinstance(line, ast.Import | ast.ImportFrom)]
            bound += [name.asname or name.name for line in imports for name in line.names]
            node.body = [line for line in body if line not in imports] or [ast.Pass()]
    tree.body.append(ast.Expr(ast.Constant(sorted(bound))))
    return ast.unparse(ast.fix_missing_locations(tree))


def renamed(base: str) -> dict[str, str]:
    """Device code that has moved since a revision: where it was, and where it is."""
    command = [
        "git",
        "diff",
        "--relative",
        "--find-renames=30%",
        "--diff-filter=R",
        "--name-status",
        base,
        "--",
        "kernels",
    ]
    lines = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split("\t")[1:] for line in lines)


def sources_today(record: Record, moved: dict[str, str], now: Read = source_text) -> list[str]:
    """The sources of a record, with device code where it is today and with what that imports.

    Raises:
        FileNotFoundError: a file is gone, and did not move.
    """
    waiting, found = [moved.get(name, name) for name in record.sources], set()
    while waiting:
        name = waiting.pop()
        text = now(name)
        if name not in found and is_device_code(name):
            imported = [node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
            ours = [
                module.removeprefix("flashlib.") for module in imported if module and module.startswith("flashlib.")
            ]
            waiting += [f"{module.replace('.', '/')}.py" for module in ours]
        found.add(name)
    return sorted(found)


if __name__ == "__main__":
    main()
