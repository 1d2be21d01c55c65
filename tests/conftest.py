from __future__ import annotations

import pytest

# before anything imports them: their assertions tell what they compared
pytest.register_assert_rewrite("tests.exporters.exports", "tests.exporters.mutations", "tests.exporters.passes_harness")
