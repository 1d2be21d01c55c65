"""Which passes run for whom, in order; every line with what it measured.

Four lists: one for ONNX Runtime and other readers of ONNX on a CPU, two for TensorRT, one for Core ML.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.passes.average_early import AverageEarly
from nextvit_exporters.passes.average_tokens import AverageTokens
from nextvit_exporters.passes.base import Pass
from nextvit_exporters.passes.channel_first_attention import ChannelFirstAttention
from nextvit_exporters.passes.convolve_projection import ConvolveProjection
from nextvit_exporters.passes.decompose_attention import DecomposeAttention
from nextvit_exporters.passes.drop_key_bias import DropKeyBias
from nextvit_exporters.passes.flatten_channels_last import FlattenChannelsLast
from nextvit_exporters.passes.fold_attention_scale import FoldAttentionScale
from nextvit_exporters.passes.fold_conv_norm import FoldConvNorm
from nextvit_exporters.passes.fold_head_norm import FoldHeadNorm
from nextvit_exporters.passes.fold_pre_norm import FoldPreNorm
from nextvit_exporters.passes.merge_average_conv import MergeAverageConv
from nextvit_exporters.passes.move_value_bias import MoveValueBias
from nextvit_exporters.passes.pack_key_value_maps import PackKeyValueMaps
from nextvit_exporters.passes.strip_train_only import StripTrainOnly

# ONNX Runtime 1.32 on two AVX-512 cores, Next-ViT-S at 224, ratio to the official route, quiet machine.
ONNX_RUNTIME: Final[tuple[Pass, ...]] = (
    StripTrainOnly(),
    DecomposeAttention(),  # only for models that call fused attention, such as timm's
    FoldConvNorm(),  # 1.00: the runtime folds too; here so that weights are rounded once, from float64
    FoldPreNorm(),  # 0.98
    FoldHeadNorm(),  # 1.00; leaves no BatchNormalization in the file
    FoldAttentionScale(),  # 1.00, four nodes less
    DropKeyBias(),  # with the next 0.996 to 1.00, eight additions less
    MoveValueBias(),
    # PackKeyValue: 0.994 to 1.00 and four nodes more, so left out
    ChannelFirstAttention(),  # 0.964
    AverageEarly(),  # 0.960, 5.5 % fewer multiply-accumulates
)

# coremltools 9.0 for iOS 16, FP16, Next-ViT-S at 224, a picture in and logits out: operations of the ML program without
# constants, one pass added after another. Nothing folded: 308, of which 28 batch_norm and 27 transpose. Nothing runs on
# a phone here; that few operations, all on (B, C, H, W) and (B, h, d, N), suit the Neural Engine is Apple's advice.
NEURAL_ENGINE: Final[tuple[Pass, ...]] = (
    StripTrainOnly(),  # 308
    DecomposeAttention(),  # only for models that call fused attention, such as timm's
    FoldConvNorm(),  # 308, coremltools folds these too; here so that weights are rounded once, from float64
    FoldPreNorm(),  # 281
    FoldHeadNorm(),  # 280, no batch_norm is left
    FoldAttentionScale(),  # 276
    DropKeyBias(),  # 276
    MoveValueBias(),  # 276; with DropKeyBias what lets PackKeyValueMaps pack without a bias
    ChannelFirstAttention(),  # 244, 27 transposes and 16 linear less; without it the whole list gives 280
    PackKeyValueMaps(),  # 240
    AverageEarly(),  # 244, 5.5 % fewer multiply-accumulates
)

# TensorRT-RTX 1.7.1 for SM75, FP16, Next-ViT-S at 224, batch 1: kernels in the engine, one pass added after another.
# Nothing folded: 179 kernels, 11.6 MB of activations. `python -m benchmarks.trt_kernels` measures the lists again.
_FOLDED: Final[tuple[Pass, ...]] = (
    StripTrainOnly(),
    DecomposeAttention(),  # the builder recognises the products and the softmax as fused attention by itself
    FoldConvNorm(),
    FoldPreNorm(),
    FoldHeadNorm(),  # 164, all norms together
    FoldAttentionScale(),  # 164
    DropKeyBias(),  # 164
    MoveValueBias(),  # 158
    # PackKeyValue: 158, the builder joins the two products by itself
    # ChannelFirstAttention: hides attention from the builder, 190 with all below and 26 MB of activations
)
FEWEST_KERNELS: Final[tuple[Pass, ...]] = (
    *_FOLDED,
    AverageTokens(),  # 149; without it the whole list gives 141
    MergeAverageConv(),  # 146; without it 135, 2.7 % fewer multiply-accumulates and 3 MB less of weights
    FlattenChannelsLast(),  # 140; without it 138
    ConvolveProjection(),  # 132; without it 140
)
"""Fewest kernels, 132 (133 at 384), with 5.95 G multiply-accumulates and 11.5 MB of activations."""
FEWEST_MACS: Final[tuple[Pass, ...]] = (
    *_FOLDED,
    AverageTokens(),  # 149
    FlattenChannelsLast(),  # 143
    ConvolveProjection(),  # 135
    AverageEarly(),  # 139, 5.5 % fewer multiply-accumulates
)
"""Fewest multiply-accumulates, 5.48 G, with 139 kernels (173 at 384) and 11.5 MB of activations."""
TENSORRT: Final[Mapping[str, tuple[Pass, ...]]] = MappingProxyType(
    {"fewest-kernels": FEWEST_KERNELS, "fewest-macs": FEWEST_MACS}
)
"""The lists for TensorRT, by the name a spec gives them."""
DEFAULT_PASS_SET: Final = "fewest-kernels"  # noqa: S105 - not a password: a pass is a rewrite
FIXED_SIZE_ONLY: Final[frozenset[str]] = frozenset({AverageTokens().name, MergeAverageConv().name})
"""Passes that hold for the height and width they saw, and not for every other."""
TENSORRT_PASSES: Final[tuple[Pass, ...]] = tuple(
    {each.name: each for passes in TENSORRT.values() for each in passes}.values()
)
"""Every pass of a TensorRT list, each once."""


def tensorrt_passes(name: str | None, *, dynamic_size: bool) -> tuple[Pass, ...]:
    """The TensorRT list of that name, the default's where it is None, with what holds at every size where it must.

    Raises UnsupportedSpec for an unknown name.
    """
    if name is not None and name not in TENSORRT:
        raise UnsupportedSpec(f"there is no pass set '{name}'; choose one of {', '.join(TENSORRT)}")
    passes = TENSORRT[name or DEFAULT_PASS_SET]
    return tuple(each for each in passes if not (dynamic_size and each.name in FIXED_SIZE_ONLY))
