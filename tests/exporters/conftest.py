from __future__ import annotations

import pytest

from nextvit_exporters.spec import ExportSpec
from tests.exporters.exports import Export, Exported, export


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export a spec, or return the file of an equal one: torch's exporter takes seconds a call."""
    files: dict[ExportSpec, Exported] = {}
    folder = tmp_path_factory.mktemp("exports")

    def get(spec: ExportSpec) -> Exported:
        if spec not in files:
            files[spec] = export(spec, folder / spec.stem / str(len(files)))
        return files[spec]

    return get
