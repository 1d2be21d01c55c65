from __future__ import annotations

import pytest

# before anything imports them: their assertions tell what they compared
pytest.register_assert_rewrite("tests.exporters.exports", "tests.exporters.mutations", "tests.exporters.passes_harness")


@pytest.hookimpl(trylast=True)  # behind pytest-randomly, which deals the files out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: a file is one process's, and the last to begin should not be one of minutes."""
    long = {item.path for item in items if item.get_closest_marker("full_size")}
    items.sort(key=lambda item: item.path not in long)
