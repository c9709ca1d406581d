"""A pytest plugin for `make nbcheck`: what a green run would otherwise keep to itself.

- How long each notebook took, its kernel's start included. A run in which one took over a minute fails.
- Which cells were executed but not compared, and the reason that stands in the cell's metadata.
"""

from collections import defaultdict
from pathlib import Path

import nbformat
import pytest

SECONDS_PER_NOTEBOOK = 60


class NotebookReport:
    """Adds up the durations of each notebook's cells. With xdist it lives in the controlling process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.partition("::")[0]] += report.duration

    @property
    def too_slow(self) -> list[str]:
        return [notebook for notebook, seconds in self.seconds.items() if seconds > SECONDS_PER_NOTEBOOK]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.too_slow and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("seconds per notebook")
        for notebook, seconds in sorted(self.seconds.items()):
            mark = f"  OVER the {SECONDS_PER_NOTEBOOK} s that a notebook may take" if notebook in self.too_slow else ""
            terminalreporter.write_line(f"{seconds:6.1f}  {notebook}{mark}", red=bool(mark))
        uncompared = [line for notebook in sorted(self.seconds) for line in self._uncompared(notebook)]
        terminalreporter.section("executed, but not compared")
        terminalreporter.write_line("\n".join(uncompared) or "none")

    def _uncompared(self, notebook: str) -> list[str]:
        cells = nbformat.read(self.root / notebook, as_version=4).cells
        code = enumerate(cell for cell in cells if cell.cell_type == "code")
        return [
            f"{notebook}::Cell {index}: {cell.metadata.get('flashlib', {}).get('not_compared', 'no reason given')}"
            for index, cell in code
            if "nbval-ignore-output" in cell.metadata.get("tags", [])
        ]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(NotebookReport(config.rootpath))
