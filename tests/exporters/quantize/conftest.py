from __future__ import annotations

import pytest

from nextvit_exporters.spec import ExportSpec
from tests.exporters.exports import Exported
from tests.exporters.quantize.int8_files import Files, export_int8


@pytest.fixture(scope="session")
def int8_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Build an INT8 file, or return that of an equal spec."""
    files: dict[ExportSpec, Exported] = {}
    folder = tmp_path_factory.mktemp("int8")

    def get(spec: ExportSpec) -> Exported:
        if spec not in files:
            files[spec] = export_int8(spec, folder / str(len(files)))
        return files[spec]

    return get
