"""`make lab` as a learner meets it: the server starts, chapter 00 opens, and a cell of it runs in a kernel."""

import json
import os
import secrets
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
import pytest
import requests
import websocket

REPOSITORY = Path(__file__).resolve().parents[2]
CHAPTER = "my_course/notebooks/00_start_here.ipynb"
AS_IT_RAN = REPOSITORY / "notebooks/answers/00_start_here.ipynb"
START_SECONDS = 120
CELL_SECONDS = 60


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it answers, and the secret that it asks for."""

    port: int
    token: str

    def request(self, method: str, path: str, **options: object) -> requests.Response:
        headers = {"Authorization": f"token {self.token}"}
        response = requests.request(
            method, f"http://localhost:{self.port}{path}", headers=headers, timeout=30, **options
        )
        response.raise_for_status()
        return response


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _wait_until_it_answers(lab: Lab, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            lab.request("GET", "/api/status")
            return
        except requests.RequestException:
            time.sleep(0.3)
    pytest.fail(f"make lab did not answer; it ended with {process.poll()}, and said:\n{log.read_text()}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    lab = Lab(_free_port(), secrets.token_hex(16))
    flags = f"--no-browser --port={lab.port} --ServerApp.port_retries=0 --ServerApp.token={lab.token}"
    # A reader's own Jupyter settings stay out of the test; without widgets a cell prints what the notebook holds.
    environment = os.environ | {"FLASHLIB_NONINTERACTIVE": "1", "JUPYTER_NO_CONFIG": "1"}
    environment |= {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["make", "lab", f"LAB_FLAGS={flags}"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(lab, process, folder / "log")
        yield lab
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End make, the server and its kernels. Kernels have process groups of their own, so the group is not enough."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=10)
    for survivor in alive:
        survivor.kill()
    process.wait(timeout=10)


def _execute(lab: Lab, kernel: str, code: str) -> list[dict]:
    """Run ``code`` in a kernel through the server's websocket, as the browser does. Returns the messages that came."""
    url = f"ws://localhost:{lab.port}/api/kernels/{kernel}/channels?token={lab.token}"
    message_id = uuid.uuid4().hex
    header = {"msg_id": message_id, "msg_type": "execute_request", "session": uuid.uuid4().hex, "username": ""}
    content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False, "stop_on_error": True}
    request = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    connection = websocket.create_connection(url, timeout=CELL_SECONDS)
    try:
        connection.send(json.dumps(request))
        answers = []
        while not _is_idle(answers):
            message = json.loads(connection.recv())
            if message["parent_header"].get("msg_id") == message_id and message["channel"] == "iopub":
                answers.append(message)
        return answers
    finally:
        connection.close()


def _is_idle(messages: list[dict]) -> bool:
    return bool(messages) and messages[-1]["content"].get("execution_state") == "idle"


def test_the_first_page_is_chapter_00(lab: Lab) -> None:
    assert f"/lab/tree/{CHAPTER}" in lab.request("GET", "/").url


def test_the_exercises_can_be_opened(lab: Lab) -> None:
    names = {entry["name"] for entry in lab.request("GET", "/api/contents/my_course").json()["content"]}
    assert {"notebooks", "exercises"} <= names


def test_the_first_cell_of_chapter_00_runs(lab: Lab) -> None:
    chapter = lab.request("GET", f"/api/contents/{CHAPTER}").json()
    assert chapter["type"] == "notebook"
    cell = next(cell for cell in nbformat.from_dict(chapter["content"]).cells if cell.cell_type == "code")
    session = {"path": CHAPTER, "name": "", "type": "notebook", "kernel": {"name": "python3"}}
    kernel = lab.request("POST", "/api/sessions", json=session).json()["kernel"]["id"]
    messages = _execute(lab, kernel, cell.source)

    assert not [message["content"] for message in messages if message["msg_type"] == "error"]
    assert not cell.outputs, "a chapter is handed out without outputs"
    ran = next(ran for ran in nbformat.read(AS_IT_RAN, as_version=4).cells if ran.cell_type == "code")
    if "nbval-ignore-output" not in ran.metadata.get("tags", []):
        printed = "".join(message["content"]["text"] for message in messages if message["msg_type"] == "stream")
        assert printed == "".join(output.text for output in ran.outputs if output.output_type == "stream")
        results = [message["content"]["data"]["text/plain"] for message in messages if "data" in message["content"]]
        assert results == [output.data["text/plain"] for output in ran.outputs if "data" in output]
