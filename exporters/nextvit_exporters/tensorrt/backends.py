"""The TensorRTs that can build an engine, as data: everything in which they differ stands in this file."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from nextvit_exporters.errors import MissingExtra, UnsupportedSpec
from nextvit_exporters.opsets import CONSUMERS
from nextvit_exporters.spec import Precision

Module = Any
"""``tensorrt`` or ``tensorrt_rtx``: neither ships types that hold for both."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU people deploy on, and its compute capability as (major, minor)."""

    title: str
    capability: tuple[int, int]

    @property
    def sm(self) -> str:
        """``SM75`` for 7.5."""
        return sm(self.capability)


GPUS: Final[Mapping[str, Gpu]] = MappingProxyType(
    {
        "t4": Gpu("Tesla T4", (7, 5)),
        "rtx2080": Gpu("GeForce RTX 2080", (7, 5)),
        "a100": Gpu("A100", (8, 0)),
        "a30": Gpu("A30", (8, 0)),
        "a10": Gpu("A10", (8, 6)),
        "a10g": Gpu("A10G", (8, 6)),
        "rtx3090": Gpu("GeForce RTX 3090", (8, 6)),
        "l4": Gpu("L4", (8, 9)),
        "l40s": Gpu("L40S", (8, 9)),
        "rtx4090": Gpu("GeForce RTX 4090", (8, 9)),
        "h100": Gpu("H100", (9, 0)),
        "rtx5090": Gpu("GeForce RTX 5090", (12, 0)),
    }
)
DEFAULT_GPU: Final = "t4"
_MAJOR: Final = re.compile(r"-[\d.]+$")


@dataclass(frozen=True, slots=True)
class Backend:
    """One TensorRT.

    ``builds_on_cpu`` says that it needs no GPU and is told the compute capability instead; the others build for the
    GPU at hand, whichever it is, and ``capabilities`` is None. ``magic`` opens its engine files; ``tells_gpus`` says
    that these name the GPUs they are for, ``plan_for_triton`` that Triton can load them. ``layers_in_log`` says that
    the detailed list of kernels is in the builder's log; otherwise the built engine is asked for it.
    ``without_timings`` says why a timing cache is refused, None where it is used; ``without_levels`` what to say where
    an optimisation level changes nothing. ``refused`` holds, by compute capability, the precisions it can't build,
    each with the reason; ``remarks`` what to know of a precision it does build.
    """

    name: str
    module: str
    distribution: str
    extra: str
    oldest: tuple[int, int]
    builds_on_cpu: bool
    capabilities: tuple[tuple[int, int], ...] | None
    magic: bytes
    tells_gpus: bool
    plan_for_triton: bool
    layers_in_log: bool
    without_timings: str | None
    without_levels: str | None
    refused: Mapping[tuple[int, int], Mapping[Precision, str]]
    remarks: Mapping[tuple[int, int], Mapping[Precision, str]]

    def newest_opset(self, version: str) -> int:
        """The newest opset that this version's parser is known to read; a later major version reads what others do."""
        own = {consumer: opset for consumer, opset in CONSUMERS.items() if _MAJOR.sub("", consumer) == self.name}
        return own.get(f"{self.name}-{version.partition('.')[0]}", max(own.values()))


BACKENDS: Final[Mapping[str, Backend]] = MappingProxyType(
    {
        "tensorrt": Backend(
            name="tensorrt",
            module="tensorrt",
            distribution="tensorrt-cu12",
            extra="trt",
            oldest=(10, 0),
            builds_on_cpu=False,
            capabilities=None,
            magic=b"ftrt",
            tells_gpus=False,
            plan_for_triton=True,
            layers_in_log=False,
            without_timings=None,
            without_levels=None,
            refused=MappingProxyType({}),
            remarks=MappingProxyType({}),
        ),
        "tensorrt-rtx": Backend(
            name="tensorrt-rtx",
            module="tensorrt_rtx",
            distribution="tensorrt-rtx-cu12",
            extra="trt-rtx",
            oldest=(1, 4),
            builds_on_cpu=True,
            capabilities=((7, 5), (8, 0), (8, 6), (8, 9), (12, 0)),
            magic=b"vtrt",
            tells_gpus=True,
            plan_for_triton=False,
            layers_in_log=True,
            without_timings="it times nothing while it builds, so a timing cache changes nothing",
            without_levels="it builds the same engine at every optimisation level",  # 0, 2 and 5: byte for byte
            refused=MappingProxyType(
                {(7, 5): MappingProxyType({Precision.FP32: "it has no float32 matrix products for Turing (SM75)"})}
            ),
            remarks=MappingProxyType(
                {
                    (7, 5): MappingProxyType(
                        {
                            Precision.INT8: "on SM75 it computes INT8 convolutions in FP16: the engine shows that the "
                            "graph is legal and what it answers, never how fast INT8 is on a T4"
                        }
                    )
                }
            ),
        ),
    }
)


def sm(capability: tuple[int, int]) -> str:
    """``SM75`` for (7, 5)."""
    return f"SM{capability[0]}{capability[1]}"


def backend(name: str) -> Backend:
    """The backend of that name; raises UnsupportedSpec when there is none."""
    if name not in BACKENDS:
        raise UnsupportedSpec(f"there is no backend '{name}'; choose one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def plain_name(name: str) -> str:
    """A GPU's name as the list writes it, however it was typed."""
    return name.lower().replace("-", "").replace(" ", "")


def gpu(name: str) -> Gpu:
    """The GPU of that name, in any case and with or without hyphens, or any of a compute capability (``sm75``).

    Raises UnsupportedSpec when there is none.
    """
    plain = plain_name(name)
    if plain in GPUS:
        return GPUS[plain]
    if found := re.fullmatch(r"sm(\d{1,2})(\d)", plain, re.ASCII):
        capability = int(found[1]), int(found[2])
        return Gpu(f"any {sm(capability)}", capability)
    raise UnsupportedSpec(
        f"there is no GPU '{name}' in the list; choose one of {', '.join(GPUS)}, or sm75 and its like"
    )


def check_precision(which: Backend, target: Gpu, precision: Precision) -> None:
    """Raise UnsupportedSpec where the backend can't build ``precision`` for the GPU, or nothing for it."""
    if which.capabilities is not None and target.capability not in which.capabilities:
        able = [name for name, each in GPUS.items() if each.capability in which.capabilities]
        raise UnsupportedSpec(f"{which.name} builds nothing for {target.title}; choose one of {', '.join(able)}")
    if reason := which.refused.get(target.capability, {}).get(precision):
        raise UnsupportedSpec(
            f"{which.name} can't build {precision} for {target.title}: {reason}; choose --fp16, another --gpu, or "
            "another --backend"
        )


def load(which: Backend) -> Module:
    """Import the backend; raises MissingExtra without it, UnsupportedSpec where it is too old or does not load."""
    try:
        module = importlib.import_module(which.module)
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        if isinstance(error, ModuleNotFoundError) and error.name == which.module:
            raise MissingExtra(f"the {which.name} backend", which.extra) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedSpec(
            f"{which.module} is installed but does not load: {reason}; run: "
            f"pip install --force-reinstall 'nextvit-deploy[{which.extra}]'"
        ) from error
    version = tuple(int(part) for part in str(module.__version__).split(".")[:2])
    if version < which.oldest:
        oldest = ".".join(map(str, which.oldest))
        raise UnsupportedSpec(
            f"{which.module} {module.__version__} is older than {oldest}; run: "
            f"pip install --upgrade 'nextvit-deploy[{which.extra}]'"
        )
    return module
