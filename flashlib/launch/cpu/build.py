"""Compile the C++ sources of :mod:`flashlib.kernels.cpu` at first use, and keep what came out.

The library has a C interface and needs no C++ runtime, no headers of PyTorch or Python, and a second of a compiler that is already on
most machines. What is kept is found again by the text of the sources, the compiler and the processor's architecture.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["BuildError", "Compiler", "built", "find_compiler"]

SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "cpu"
# Those for C first: told that the source is C++ they compile it too, and link no C++ runtime, which nothing here needs.
COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")
# No -ffast-math: hidden scores are -inf, and code that assumes finite numbers may do anything with them.
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread"),
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    "-ffp-contract=off",  # what is to be fused says so; then all compilers give the same bits
)
LIBRARIES = ("-lm",) if platform.system() == "Darwin" else ("-Wl,--as-needed", "-lm")
TIMEOUT_S = 300
DIGEST_BYTES = 32


class BuildError(RuntimeError):
    """There is no compiler, or it failed. The message says which, and what it said."""


class Compiler:
    """A compiler for C++.

    Attributes:
        command: the words of its command line; arguments follow.

    Raises:
        BuildError: it does not start, or does not compile C++; says what it said.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command
        said = self._run("-x", "c++", "-std=c++17", "-fsyntax-only", os.devnull)
        if said.returncode:
            raise BuildError(f"{shlex.join(command)} does not compile C++: {_end(said.stderr)}")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*self.command, *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"{shlex.join(self.command)} does not run: {error}") from None

    def compile(self, source: Path, flags: tuple[str, ...], to: Path) -> None:
        """Make a shared library.

        Raises:
            BuildError: the compiler failed; with the end of what it said.
        """
        said = self._run(*FLAGS, *flags, str(source), *LIBRARIES, "-o", str(to))
        if said.returncode:
            raise BuildError(f"{shlex.join(self.command)} could not compile {source.name}: {_end(said.stderr)}")


def _end(said: str) -> str:
    return said.strip()[-400:]


@cache
def find_compiler() -> Compiler:
    """The compiler that ``CXX`` in the environment names; else the first one on the path that compiles C++.

    Raises:
        BuildError: there is none, or the one named does not work; says which were tried, and what they said.
    """
    asked = os.environ.get("CXX")
    if asked:
        return Compiler(shlex.split(asked))
    said = []
    for name in filter(shutil.which, COMPILERS):
        try:
            return Compiler([name])
        except BuildError as error:
            said.append(str(error))
    found = "; ".join(said) or f"found none of {', '.join(COMPILERS)}"
    raise BuildError(f"needs a C++ compiler: {found}. The environment variable CXX may name another")


def built(source: str, flags: tuple[str, ...] = ()) -> Path:
    """The shared library compiled from ``source``, a file of :data:`SOURCES`, from the cache or made now.

    Several processes may come at once: each makes its own file and puts it in place in one step.

    Raises:
        BuildError: it is not in the cache and cannot be made.
    """
    name = f"{Path(source).stem}-{_digest(source, flags)}.so"
    folder = _cache_folder()
    kept = folder / name
    if _is_whole(kept):
        return kept
    compiler = find_compiler()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _make(compiler, source, flags, folder, name)
    except OSError:  # a cache that cannot be written to: what is made lasts as long as this process
        pass
    try:
        return _make(compiler, source, flags, _private_folder(), name)
    except OSError as error:
        raise BuildError(f"there is no folder to build {source} in: {error}") from None


def _make(compiler: Compiler, source: str, flags: tuple[str, ...], folder: Path, name: str) -> Path:
    handle, partial = tempfile.mkstemp(prefix=".partial-", suffix=".so", dir=folder)
    os.close(handle)
    try:
        compiler.compile(SOURCES / source, flags, Path(partial))
        with open(partial, "r+b") as file:
            content = file.read()
            file.write(hashlib.sha256(content).digest())
        os.replace(partial, folder / name)
    finally:
        Path(partial).unlink(missing_ok=True)
    return folder / name


def _is_whole(path: Path) -> bool:
    """Whether the file is there, with the digest of the rest at its end. Half a library would end the process that loads it."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _digest(source: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr((FLAGS, flags, LIBRARIES, platform.system(), platform.machine())).encode())
    for path in [SOURCES / source, *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _cache_folder() -> Path:
    """``$FLASHLIB_CACHE/cpu`` if that is set, else in the user's cache folder."""
    override = os.environ.get("FLASHLIB_CACHE")
    if override:
        return Path(override).expanduser() / "cpu"
    try:
        import platformdirs
    except ImportError:  # the library alone, brought to a machine by hand
        return _private_folder()
    return platformdirs.user_cache_path("flashlib") / "cpu"


@cache
def _private_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="flashlib-cpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
