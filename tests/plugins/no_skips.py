"""Fails the run when a test outside tests/gpu was skipped or expected to fail: what nobody runs proves nothing."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _hidden(terminalreporter):
        terminalreporter.write_line(f"SKIPPED OUTSIDE tests/gpu: {line}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and reporter is not None and _hidden(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _hidden(reporter: pytest.TerminalReporter) -> list[str]:
    """Node ids of skips and expected failures outside tests/gpu; under xdist the reports reach the controller alone."""
    reports = [*reporter.stats.get("skipped", []), *reporter.stats.get("xfailed", [])]
    return sorted({r.nodeid for r in reports if not r.nodeid.startswith("tests/gpu/")})
