"""Packages of nano, each written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextvit_exporters.coreml.program import Package
from nextvit_exporters.coreml.reader import read_package


@pytest.fixture(scope="session")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of packages, each written by a process of its own; not to be changed."""
    from tests.exporters.coreml.built import started  # which skips where there is no coremltools

    folders = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second") / "deeper" / "still"
    processes = [started(folder, seed) for seed, folder in enumerate(folders, 1)]
    for seed, (folder, process) in enumerate(zip(folders, processes, strict=True), 1):
        out, err = process.communicate(timeout=600)
        assert (process.returncode, out, err) == (0, "", "")
        assert list((folder / f"temporary-{seed}").iterdir()) == []
        assert list((folder / f"working-{seed}").iterdir()) == []
    return folders


@pytest.fixture(scope="session")
def packages(twice: tuple[Path, Path]) -> dict[str, Package]:
    """``SPECS`` as they were read back."""
    from tests.exporters.coreml.built import SPECS

    return {name: read_package(twice[0] / f"{name}.mlpackage") for name in SPECS}
