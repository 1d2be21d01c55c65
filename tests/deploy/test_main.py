"""The module and the installed script are the same program, of the version the package has."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import nextvit_deploy


def test_module_and_script_tell_the_version() -> None:
    script = Path(sys.executable).with_name("nextvit-export")
    for command in ([sys.executable, "-m", "nextvit_deploy"], [str(script)]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == nextvit_deploy.__version__ == metadata.version("nextvit-deploy")
