"""``python -m nextvit_deploy`` is ``nextvit-export``."""

from __future__ import annotations

from nextvit_deploy.cli import main

if __name__ == "__main__":
    main()
