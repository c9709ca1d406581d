"""Building the CPU kernels at first use: what is kept, what is made again, and what a machine says on which it cannot be done.

Each test has a cache of its own and starts a process of its own: what was loaded once stays loaded.
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flashlib.backends import BACKENDS
from flashlib.launch.cpu.build import find_compiler

CALL = """
import torch
from flashlib import attention
from flashlib.backends import BACKENDS
from flashlib.launch.cpu.build import find_compiler
from flashlib.reference import assert_within_budget
q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
missing = BACKENDS["cpu"].missing()
print(missing or "built")
assert_within_budget(attention(q, k, v, causal=True, backend="auto" if missing else "cpu"), q, k, v, causal=True)
"""


@pytest.fixture
def compiler() -> None:
    if BACKENDS["cpu"].missing():
        pytest.skip(BACKENDS["cpu"].missing())


def started(cache: Path, **environment: str) -> subprocess.Popen:
    shared = {
        "FLASHLIB_CACHE": str(cache),
        "FLASHLIB_CPU": "avx2",
        "OMP_NUM_THREADS": "1",
    }  # avx2 is the quickest to compile
    environment = {**os.environ, **shared, **environment}
    return subprocess.Popen([sys.executable, "-c", CALL], env=environment, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen) -> str:
    answer, _ = process.communicate(timeout=240)
    assert process.returncode == 0, answer
    return answer.strip()


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "cpu").glob("*"))


def test_it_is_built_once_by_however_many_processes_and_made_again_if_spoilt(compiler, tmp_path):
    together = [started(tmp_path), started(tmp_path)]
    assert [said(process) for process in together] == ["built", "built"]
    kept = libraries(tmp_path)
    assert [path.name.partition("-")[0] for path in kept] == ["library", "probe"]  # and nothing half finished
    made = {path: path.stat().st_mtime_ns for path in kept}
    # A library that is there is not built again: no compiler is asked for.
    assert said(started(tmp_path, CXX="/nowhere/c++")) == "built"
    assert {path: path.stat().st_mtime_ns for path in libraries(tmp_path)} == made
    whole = kept[0].read_bytes()
    kept[0].write_bytes(whole[: len(whole) // 2])
    assert said(started(tmp_path)) == "built"
    assert kept[0].stat().st_size == len(whole)


def test_a_cache_that_cannot_be_written_to(compiler, tmp_path):
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("where the cache should be")
    assert said(started(not_a_folder, TMPDIR=str(tmp_path))) == "built"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # what was built for the process went with it


def test_without_a_compiler_the_reason_is_told_and_auto_goes_on(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    answer = said(started(tmp_path, PATH=str(empty), CXX=""))
    assert answer.startswith("needs a C++ compiler: found none of cc, gcc, clang") and "CXX" in answer


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell to stand in for a compiler")
def test_a_compiler_that_fails_is_named_with_what_it_said(tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no headers here' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    answer = said(started(tmp_path, CXX=str(broken)))
    assert "broken-c++ does not compile C++: fatal error: no headers here" in answer


def test_a_variant_that_does_not_exist_is_refused(compiler, tmp_path):
    assert "there is no variant 'avx1024' (in FLASHLIB_CPU); variants are" in said(
        started(tmp_path, FLASHLIB_CPU="avx1024")
    )


def sanitized(variant: str, what: str, cache: Path) -> subprocess.CompletedProcess:
    """What the sanitizers say of a variant, over so many random problems or of a planted fault."""
    if BACKENDS["cpu"].missing() or sys.platform != "linux":
        pytest.skip(BACKENDS["cpu"].missing() or "how the sanitizer is loaded is known for Linux alone")
    found = subprocess.run(
        [*find_compiler().command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    preload = found.stdout.strip()
    if not os.path.isabs(preload):
        pytest.skip("the compiler comes without the library of its address sanitizer")
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    environment["FLASHLIB_CACHE"] = str(cache)
    command = [sys.executable, str(Path(__file__).with_name("sanitized_cpu.py")), variant, what]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)


def test_the_sanitizers_find_nothing(tmp_path):
    """Few problems here; 300 of each variant take minutes: `python tests/kernels/sanitized_cpu.py` says how."""
    run = sanitized("avx2", "12", tmp_path)
    assert run.returncode == 0 and "12 problems without a complaint" in run.stdout, run.stdout + run.stderr[-2000:]
    run = sanitized("avx2", "planted", tmp_path)
    assert run.returncode != 0 and "heap-buffer-overflow" in run.stderr, run.stderr[-2000:]
