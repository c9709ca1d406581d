"""A pytest plugin for `make nbcheck`: how long each notebook took, and a failed run if one took over a minute.

The time is that of the notebook's cells and of the start of its kernel, as pytest measured them.
"""

from collections import defaultdict

import pytest

SECONDS_PER_NOTEBOOK = 60


class NotebookBudget:
    """Adds up the durations of each notebook's cells. With xdist it lives in the controlling process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        notebook = report.nodeid.partition("::")[0]
        self.seconds[notebook] += report.duration

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


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(NotebookBudget())
