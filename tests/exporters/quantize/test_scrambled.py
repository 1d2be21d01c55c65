"""The scrambled demo computes what the demo does, and its channels differ by as much as was asked."""

from __future__ import annotations

from pathlib import Path

import torch

from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.exporters.quantize.scrambled import scramble_model, scrambled_checkpoint
from tests.harness import images, relative_error


def test_a_scrambled_checkpoint_computes_the_same(tmp_path: Path) -> None:
    demo, mixed = load_checkpoint(DEMO_CHECKPOINT), load_checkpoint(scrambled_checkpoint(tmp_path / "s", 2.0, 0))
    assert (mixed.labels, mixed.preprocessing, mixed.num_classes) == (demo.labels, demo.preprocessing, 10)
    assert not mixed.norms_suspect
    x = images(4, 3, 64, 64, seed=1)
    with torch.no_grad():
        assert relative_error(mixed.model(x), demo.model(x)) < 1e-5
        assert relative_error(mixed.model.double()(x.double()), demo.model.double()(x.double())) < 1e-12


def test_channels_differ_by_what_was_asked() -> None:
    demo, mixed = (load_checkpoint(DEMO_CHECKPOINT).model for _ in range(2))
    scramble_model(mixed, 2.0, 0)
    before, after = (model.state_dict() for model in (demo, mixed))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 3 * 3 + 7 * 3 + 7 * 3  # stem, MHCA, MLP: a weight and a bias, and what reads them
    ratios = torch.cat([torch.log2(after[n] / before[n]).flatten() for n in changed if n.endswith("mlp.conv1.bias")])
    assert 1.5 < float(ratios.std()) < 2.5
