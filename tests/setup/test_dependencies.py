"""One set of dependencies: pyproject.toml says which, constraints.txt at which version, environment.yml follows both."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10.13", "3.11.7", "3.12.1", "3.13.0")
SYSTEMS = (("linux", "Linux", "x86_64"), ("darwin", "Darwin", "arm64"))
# Used if importable, and never required: each is a way to run attention that must be built for the GPU at hand.
OPTIONAL_IMPORTS = {"flash_attn", "flash_attn_interface"}


def _pins() -> list[Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def _environment(python: str, system: tuple[str, str, str]) -> dict[str, str]:
    sys_platform, platform_system, machine = system
    return default_environment() | {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": sys_platform,
        "platform_system": platform_system,
        "platform_machine": machine,
    }


def _version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    return specifier.version


def _pins_for(environment: dict[str, str]) -> dict[str, str]:
    """The version of each package in one environment; fails if two pins speak of the same."""
    versions: dict[str, str] = {}
    for pin in _pins():
        if pin.marker is None or pin.marker.evaluate(environment):
            assert canonicalize_name(pin.name) not in versions, f"two pins for {pin.name}"
            versions[canonicalize_name(pin.name)] = _version(pin)
    return versions


def _wanted(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed package asks for here, with these of its extras."""
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *extras}):
            yield requirement


def _installed_by(extra: str) -> dict[str, str]:
    """Name and version of every package that ``pip install flashlib[extra]`` brings here, followed through all of them."""
    done: dict[str, set[str]] = defaultdict(set)
    todo = [("flashlib", frozenset({extra}))]
    while todo:
        name, extras = todo.pop()
        if name in done and extras <= done[name]:
            continue
        done[name] |= extras
        todo += [(canonicalize_name(want.name), frozenset(want.extras)) for want in _wanted(name, extras)]
    return {name: metadata.version(name) for name in done if name != "flashlib"}


def test_every_pin_is_exact() -> None:
    for pin in _pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, str(pin)


def test_torch_and_triton_are_pinned_as_a_pair() -> None:
    pins = {pin.name: pin for pin in _pins()}
    assert (
        str(pins["torch"]) == "torch==2.13.0"
    )  # for every Python and system: the one that the notebooks were run with
    assert _version(pins["triton"]) == "3.7.1"  # the version that this torch asks for where it comes with CUDA
    assert not pins["triton"].marker.evaluate({"sys_platform": "darwin"})


def test_all_that_is_installed_is_pinned_at_its_version() -> None:
    pins, installed = _pins_for(default_environment()), _installed_by("dev")
    assert len(installed) > 100
    unpinned = {
        name: version
        for name, version in installed.items()
        if name not in pins or not SpecifierSet(f"=={pins[name]}").contains(version)
    }
    assert not unpinned, f"run `make pins` (and `make install`): {unpinned}"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system[0])
def test_pins_satisfy_pyproject_on_every_python(python: str, system: tuple[str, str, str]) -> None:
    environment = _environment(python, system)
    pins = _pins_for(environment)
    asked = [Requirement(text) for text in metadata.requires("flashlib")]
    for requirement in asked:
        marker = requirement.marker
        applies = marker is None or any(marker.evaluate(environment | {"extra": extra}) for extra in ("", "dev"))
        if applies and requirement.name != "flashlib":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_conda_environment_agrees_with_pyproject() -> None:
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    project = metadata.metadata("flashlib")
    (pip_section,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    conda = dict(_conda_requirement(entry) for entry in environment["dependencies"] if isinstance(entry, str))

    assert environment["name"] == project["Name"]
    assert conda.pop("python") == SpecifierSet(project["Requires-Python"])
    # All else comes from pyproject.toml and constraints.txt through pip: conda brings the tools only, at any version.
    assert pip_section == ["-c constraints.txt", "-e .[dev]"]
    assert conda == dict.fromkeys(("pip", "git", "make"), SpecifierSet())
    assert "dev" in project.get_all("Provides-Extra")


def test_readme_says_which_versions_are_supported() -> None:
    """The table of README, held against pyproject.toml and the pins."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (Python|PyTorch|Triton) \| (.+) \|$", text, re.MULTILINE))
    asked = {requirement.name: requirement.specifier for requirement in map(Requirement, metadata.requires("flashlib"))}
    pins = {pin.name: _version(pin) for pin in _pins() if pin.name in ("torch", "triton")}
    first, last = re.match(r"(3\.\d+) to (3\.\d+) ", rows["Python"]).groups()
    supported = SpecifierSet(metadata.metadata("flashlib")["Requires-Python"])
    minors = [minor for minor in range(6, 30) if supported.contains(f"3.{minor}.0")]
    assert (first, last) == (f"3.{minors[0]}", f"3.{minors[-1]}")
    for row, package in (("PyTorch", "torch"), ("Triton", "triton")):
        assert str(asked[package]) == f">={rows[row].split()[0]}" and pins[package] in rows[row]


def test_the_version_is_the_package_s_own() -> None:
    import flashlib

    assert flashlib.__version__ == metadata.version("flashlib")
    assert f", {flashlib.__version__}\n" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def _conda_requirement(entry: str) -> tuple[str, SpecifierSet]:
    requirement = Requirement(entry)
    return requirement.name, requirement.specifier


def _imported(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every top-level module that the code in ``folder`` imports, at the top of a file or inside a function."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.partition(".")[0], path


@pytest.mark.parametrize(("folder", "extra"), [("flashlib", "course"), ("tests", "dev")])
def test_every_import_is_a_declared_dependency(folder: str, extra: str) -> None:
    declared = {
        canonicalize_name(want.name) for want in _wanted("flashlib", frozenset({"cli", "models", "course", extra}))
    }
    files = [path for path in (REPOSITORY / "tests").rglob("*.py") if not path.stem.startswith("test_")]
    files += (REPOSITORY / "benchmarks").glob("*.py")  # whose functions tests call, too
    helpers = {path.stem for path in files} | {path.parent.name for path in files}
    own = {"flashlib"} | OPTIONAL_IMPORTS | (helpers if folder == "tests" else set())
    distributions = metadata.packages_distributions()
    undeclared = {
        f"{module} in {path.relative_to(REPOSITORY)}"
        for module, path in _imported(REPOSITORY / folder)
        if module not in sys.stdlib_module_names
        and module not in own
        and not declared & {canonicalize_name(name) for name in distributions.get(module, [])}
    }
    assert not undeclared
