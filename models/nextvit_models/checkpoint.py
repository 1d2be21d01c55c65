"""From a file that nobody vouches for to a Next-ViT that is known, and back to the safe form of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from nextvit_models import _hub
from nextvit_models._assemble import build, convert, fit_variant
from nextvit_models._read import read_weights
from nextvit_models._state_dict import StateDict, find_state_dict
from nextvit_models.config import NextViTConfig
from nextvit_models.errors import CheckpointMismatch, DeployError
from nextvit_models.files import atomic_path, sha256_of
from nextvit_models.layouts import COUNTER, Layout
from nextvit_models.nextvit import NextViT
from nextvit_models.norms import fold_evidence, foldable_norms
from nextvit_models.preprocessing import Preprocessing


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A trained Next-ViT and everything its file told about it.

    ``model`` is a float32 classifier in eval mode on the CPU, tied to no file. ``sha256`` is that of the file;
    ``fingerprint`` that of the weights alone, by official name and as float32, so every copy of them shares it
    whatever its layout or format. ``found`` says in plain lines how each property was inferred. ``labels`` names the
    classes, or is empty. ``norms_merged``: the norms in front of the linear maps were folded into these and taken
    out (exact). ``norms_suspect``: they seem to have been folded but are still there, and will act a second time.
    """

    model: NextViT
    name: str
    sha256: str
    fingerprint: str
    layout: Layout
    found: tuple[str, ...]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    norms_merged: bool
    norms_suspect: bool

    @property
    def num_classes(self) -> int:
        """Columns of the logits."""
        return self.model.num_classes


@dataclass(frozen=True, slots=True)
class _Hints:
    """What stands beside the weights, and where it stands."""

    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    origin: str = ""


def load_checkpoint(source: str | Path, *, ema: bool = False) -> Checkpoint:
    """Load a ``.pth`` or ``.safetensors`` file or a hub id such as ``timm/nextvit_small.bd_in1k``.

    Variant, number of classes and layout (official or timm) are inferred from tensor names and shapes. ``ema``
    takes the averaged weights where a file holds both. Nothing in the file is executed. Raises
    ``CheckpointMismatch`` when it is not a complete Next-ViT classifier, ``UnsafeCheckpoint`` when its pickle would
    import code, ``MissingExtra`` when a hub id is given without ``huggingface_hub``.
    """
    path, hints, name = Path(source), _Hints(), Path(source).name
    shown = str(source)
    if not path.exists() and _hub.is_hub_id(path.as_posix()):
        name = shown = path.as_posix()
        files = _hub.download(name)
        path = files.weights
        if files.config:
            hints = _Hints(*_hub.read_config(files.config), origin="config.json")
    contents = read_weights(path)
    try:
        weights = find_state_dict(contents.value, ema=ema)
        hints = _header_hints(contents.metadata) or hints
        del contents  # an optimizer's state, perhaps: let it go before the weights are copied
        return _identified(weights, hints, name, sha256_of(path))
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{shown}: {error}") from error


def save_safetensors(checkpoint: Checkpoint, path: Path) -> None:
    """Write the safe form: official names, float32, and in the header what ``load_checkpoint`` restores.

    The same checkpoint gives the same bytes. A file already at ``path`` is replaced only by a whole new one. Raises
    ``OutputNotWritten`` when the system refuses. Format: https://huggingface.co/docs/safetensors.
    """
    tensors = _float_tensors(checkpoint.model)
    header: dict[str, object] = {
        "__metadata__": {
            "labels": json.dumps(checkpoint.labels),
            "preprocessing": json.dumps(checkpoint.preprocessing.as_dict()),
            "variant": checkpoint.model.config.name,
        }
    }
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as sibling, sibling.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def _identified(weights: StateDict, hints: _Hints, name: str, sha256: str) -> Checkpoint:
    """The checkpoint from tensors under the file's own names; raises half sentences about the file."""
    layout, fit = fit_variant(weights.tensors)
    config = fit.config
    tensors, dtypes = convert(weights.tensors, fit)
    num_classes = tensors["proj_head.0.weight"].shape[0]
    evidence = None if fit.norms_merged else fold_evidence(tensors, config)
    model = build(config, num_classes, tensors, norms_merged=fit.norms_merged)
    found = [
        *weights.found,
        f"layout {layout}: tensors are named like {fit.names['features.0.mlp.conv1.weight']}",
        f"variant {config.name}: {_described(config)}",
        f"classes {num_classes}: rows of {fit.names['proj_head.0.weight']}",
        *dtypes,
    ]
    if fit.norms_merged:
        found.append(f"norms merged: none of the {len(foldable_norms(config))} norms in front of linear maps is there")
    if evidence and evidence.suspect:
        found.append(
            "norms suspect: the weights follow the scales of the norms in front of them "
            f"(slope {evidence.slope:.2f}, correlation {evidence.correlation:.2f}), as after the official merge_bn(): "
            "these norms would act twice; use the file from before merge_bn()"
        )
    preprocessing, labels, lines = _resolved(hints, config, num_classes)
    return Checkpoint(
        model=model,
        name=name,
        sha256=sha256,
        fingerprint=_fingerprint(model),
        layout=layout,
        found=(*found, *lines),
        preprocessing=preprocessing,
        labels=labels,
        norms_merged=fit.norms_merged,
        norms_suspect=evidence is not None and evidence.suspect,
    )


def _described(config: NextViTConfig) -> str:
    repeats = sum(block.kind == "ntb" for block in config.stages[2])
    return f"{sum(config.depths)} blocks, stage 3 repeats its pattern {repeats} {'time' if repeats == 1 else 'times'}"


def _header_hints(metadata: Mapping[str, str]) -> _Hints | None:
    """What ``save_safetensors`` left in the header; None where the header is someone else's."""
    if "preprocessing" not in metadata:
        return None
    try:
        preprocessing = Preprocessing.from_dict(json.loads(metadata["preprocessing"]))
        labels = json.loads(metadata.get("labels", "[]"))
    except (ValueError, DeployError) as error:
        raise CheckpointMismatch(f"damaged metadata in its header: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise CheckpointMismatch("damaged metadata in its header: labels are not a list of names")
    return _Hints(preprocessing, tuple(labels), "its header")


def _resolved(
    hints: _Hints, config: NextViTConfig, num_classes: int
) -> tuple[Preprocessing, tuple[str, ...], list[str]]:
    """Preprocessing, labels, and the lines that say where they come from."""
    preprocessing, lines = hints.preprocessing, [f"preprocessing from {hints.origin}"]
    if preprocessing is None:
        preprocessing = replace(Preprocessing(), image_size=config.image_size)
        lines = [f"preprocessing not in the file: ImageNet's assumed, at {config.image_size} pixels"]
    if len(hints.labels) in {0, num_classes}:
        return preprocessing, hints.labels, lines
    lines.append(f"labels ignored: {hints.origin} has {len(hints.labels)} for {num_classes} classes")
    return preprocessing, (), lines


def _float_tensors(model: NextViT) -> dict[str, Tensor]:
    """Parameters and statistics by name, sorted; without BatchNorm's step counters."""
    return {name: tensor for name, tensor in sorted(model.state_dict().items()) if not name.endswith(COUNTER)}


def _fingerprint(model: NextViT) -> str:
    """SHA-256 over name, shape and little-endian float32 values of every tensor, by name."""
    digest = hashlib.sha256()
    for name, tensor in _float_tensors(model).items():
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().astype("<f4", copy=False).tobytes()
