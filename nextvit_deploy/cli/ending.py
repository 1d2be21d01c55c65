"""How an export or a verification ends: tables or JSON, and the exit status of its verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextvit_deploy import terminal as t

if TYPE_CHECKING:
    from nextvit_deploy.manifest import Manifest


def ending(manifest: Manifest, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print the manifest and leave with 3 for a failed artefact, 4 for one that is not verified."""
    from nextvit_deploy.render_manifest import show_manifest
    from nextvit_deploy.verdict import Verdict

    if as_json:
        t.print_json(manifest.as_dict())
    elif not quiet:
        with t.printing() as console:
            show_manifest(console, manifest, verbose=verbose)
    if manifest.verdict is Verdict.VERIFIED:
        return
    reasons = "; ".join(dict.fromkeys(f"{c.question}: {c.why}" for c in manifest.checks if c.why))
    status = t.FAILED if manifest.verdict is Verdict.FAILED else t.NOT_VERIFIED
    t.fail(f"{manifest.artifact.path.name} is {manifest.verdict}: {reasons}", status)
