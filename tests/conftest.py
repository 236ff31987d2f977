"""What holds for every test: the order, and that continuous integration (USAGI_STRICT=1) never skips silently."""

import os

import pytest

STRICT = os.environ.get("USAGI_STRICT") == "1"


def pytest_collection_modifyitems(items):
    """The containers' tests last: they are slow, and what they would show second-hand the others show first."""
    items.sort(key=lambda item: item.get_closest_marker("docker") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    return _no_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Modules too: `pytest.importorskip` and `pytest.skip(allow_module_level=True)` skip a whole file."""
    report = yield
    return _no_skip(report)


def _no_skip(report):
    if STRICT and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"USAGI_STRICT=1, so a skip is a failure. {reason}"
    return report
