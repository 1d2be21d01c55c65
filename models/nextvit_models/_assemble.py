"""From named tensors to a model: which variant they fit, own float32 copies of them, the model made of these."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from nextvit_models.config import NextViTConfig
from nextvit_models.errors import CheckpointMismatch
from nextvit_models.layouts import COUNTER, Fit, Layout, closest_variant, layout_of, other_model
from nextvit_models.nextvit import NextViT
from nextvit_models.norms import foldable_norms

_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_HALF_KNOWN: Final = 0.5  # share of matching tensors from which a file counts as a damaged Next-ViT


def fit_variant(tensors: Mapping[str, Tensor]) -> tuple[Layout, Fit]:
    """Layout and variant that fit exactly, or the refusal that says what the file looks like."""
    layout = layout_of(tensors)
    fit = closest_variant({name: tuple(tensor.shape) for name, tensor in tensors.items()}, layout or "official")
    if layout and fit.exact:
        return layout, fit
    parts = {name.split(".")[0] for name in tensors}
    differences = _differences(fit)
    if "backbone" in parts:
        beside = ", ".join(sorted(parts - {"backbone"})) or "nothing"
        raise CheckpointMismatch(
            f"a detection or segmentation checkpoint (backbone beside {beside}); only classifiers are read"
        )
    if "extra_norm_list" in parts:
        raise CheckpointMismatch("a dense-task backbone (extra_norm_list), without the head of a classifier")
    if fit.share < _HALF_KNOWN:
        other = other_model(tensors)
        raise CheckpointMismatch(
            f"not a Next-ViT; {f'looks like {other}' if other else 'no known architecture'}; against the closest "
            f"variant, {fit.config.name}: {differences}"
        )
    head = {file_name for name, file_name in fit.names.items() if name.startswith(("proj_head.", "norm."))}
    if fit.missing and head.issuperset(fit.missing) and not fit.unexpected and not fit.wrong_shape:
        raise CheckpointMismatch(f"a {fit.config.name} backbone without its classifier: {differences}")
    raise CheckpointMismatch(f"looks like {fit.config.name}, but does not fit it: {differences}")


def _differences(fit: Fit) -> str:
    """Counts and first names of what is missing, unexpected or of another shape."""
    kinds = (("missing", fit.missing), ("unexpected", fit.unexpected), ("of another shape", fit.wrong_shape))
    parts = []
    for kind, names in kinds:
        if names:
            rest = f", and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:5])}{rest})")
    return "; ".join(parts) or "nothing differs"


def convert(tensors: dict[str, Tensor], fit: Fit) -> tuple[dict[str, Tensor], list[str]]:
    """Own float32 copies by official name; ``tensors`` is emptied on the way, to hold no more than one twice."""
    converted: dict[str, Tensor] = {}
    kinds: Counter[torch.dtype] = Counter()
    for official, file_name in fit.names.items():
        if official.endswith(COUNTER):
            continue
        tensor = tensors.pop(file_name)
        kinds[tensor.dtype] += 1
        converted[official] = _float32(file_name, tensor)
    lines = [
        f"dtype: {count} of {kinds.total()} tensors {'rounded' if kind == torch.float64 else 'widened'} from "
        f"{str(kind).removeprefix('torch.')} to float32"
        for kind, count in kinds.items()
        if kind != torch.float32
    ]
    return converted, lines


def _float32(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointMismatch(f"{name} is {kind}; only float32, float16, bfloat16 and float64 weights are read")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise CheckpointMismatch(f"{name} of shape {tuple(tensor.shape)} has fewer values stored than that")
    copy = tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not math.isfinite(copy.sum(dtype=torch.float64)):  # float32 values cannot overflow a float64 sum
        raise CheckpointMismatch(f"{name} holds NaN or infinity")
    if name.endswith("running_var") and copy.min() < 0:
        raise CheckpointMismatch(f"{name} holds a negative variance")
    return copy


def build(config: NextViTConfig, num_classes: int, tensors: dict[str, Tensor], *, norms_merged: bool) -> NextViT:
    """The model made of these very tensors: it is laid out without memory and then given them."""
    with torch.device("meta"):
        model = NextViT(config, num_classes)
    for norm in foldable_norms(config) if norms_merged else ():
        parent, _, name = norm.rpartition(".")
        model.get_submodule(parent).register_module(name, nn.Identity())
    counters = {name: torch.zeros((), dtype=torch.int64) for name in model.state_dict() if name.endswith(COUNTER)}
    model.load_state_dict({**tensors, **counters}, strict=True, assign=True)
    return model.eval()
