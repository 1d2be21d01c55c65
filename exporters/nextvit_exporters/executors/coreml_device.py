"""Core ML itself on a Mac: the saved package, predicted by what will run it, on one choice of compute units.

coremltools hands the package to Core ML, which compiles it for this machine. An app chooses the units as it loads a
model; the package doesn't hold them. So each choice is an executor of its own.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from nextvit_exporters.coreml.loading import coremltools, heard
from nextvit_exporters.coreml.program import Feature, Package
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.errors import BuildFailed, NotExecutable, UnsupportedSpec, VerificationFailed
from nextvit_exporters.executors.base import PROBABILITIES, Array, Arrays

if TYPE_CHECKING:
    from typing_extensions import Self

UNITS: Final[Mapping[str, str]] = MappingProxyType(
    {"cpuOnly": "CPU_ONLY", "cpuAndGPU": "CPU_AND_GPU", "cpuAndNeuralEngine": "CPU_AND_NE", "all": "ALL"}
)
"""The choices of compute units as Swift names them, and coremltools' names."""
_NATIVE: Final = "libcoremlpython*"
_LOADED: Final = "__proxy__"
"""What coremltools' model holds of Core ML's; None where that could not be loaded, which is only warned of."""


def devices(path: Path) -> tuple[CoreMLDevice, ...]:
    """An executor of the package for each choice of compute units."""
    return tuple(CoreMLDevice(path, unit) for unit in UNITS)


def why_not_here(system: str = sys.platform) -> str | None:
    """Why Core ML can't predict on this machine; None where it can."""
    if system != "darwin":
        return "Core ML runs on macOS only"
    found = importlib.util.find_spec("coremltools")
    if found is None:
        return "coremltools is not installed; run: pip install 'nextvit-deploy[coreml]'"
    if not any(next(Path(place).glob(_NATIVE), None) for place in found.submodule_search_locations or ()):
        return "this coremltools has no native libraries for this Python and Mac; install a wheel of it that does"
    return None


class CoreMLDevice:
    """Executes a saved package with Core ML on this Mac; ``unit`` is a name in ``UNITS``.

    Entering raises BuildFailed when the package is damaged or Core ML refuses it, and NotExecutable where there is no
    Core ML, or one too old for the package.
    """

    mode = "device"

    def __init__(self, path: Path, unit: str) -> None:
        if unit not in UNITS:
            raise UnsupportedSpec(f"there are no compute units '{unit}'; choose one of {', '.join(UNITS)}")
        self.path, self.unit = path, unit
        self._package: Package | None = None
        self._model: Any = None

    @property
    def name(self) -> str:
        """``coreml on macOS 15.5, cpuAndNeuralEngine``; known before it is entered."""
        return f"coreml on {_system()}, {self.unit}"

    def __enter__(self) -> Self:
        package = read_package(self.path)
        if reason := why_not_here():
            raise NotExecutable(reason)
        with heard() as lines:
            self._model = _load(self.path, self.unit)
        if getattr(self._model, _LOADED, None) is None:
            raise _refused(self.path, package, lines)
        self._package = package
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._package = self._model = None

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name; the executor must have been entered.

        A picture is uint8 (1, H, W, 3) in RGB, a tensor has the described shape and any real type. Tensors come out
        under their own names, real ones in float32; a classifier gives ``probabilities`` (1, classes) in the order of
        the package's labels.

        Raises UnsupportedSpec for inputs that the package is not described to take, VerificationFailed where Core ML
        can't predict, or returns other outputs or labels than the package describes.
        """
        if self._package is None:
            raise RuntimeError("the executor is closed; use it in a with statement")
        fed = _fed(self._package, inputs)
        with heard():
            try:
                found = self._model.predict(fed)
            except Exception as error:  # coremltools raises bare Exception where Core ML fails
                raise VerificationFailed(f"Core ML can't predict with {self.path.name}: {_line(error)}") from error
        return _outputs(self._package, found)


def _system() -> str:
    version = platform.mac_ver()[0]
    return f"macOS {version}" if version else platform.system()


def _load(path: Path, unit: str) -> Any:
    """The model that coremltools makes; raises NotExecutable for units that this macOS doesn't offer."""
    package = coremltools()
    try:
        return package.models.MLModel(str(path), compute_units=getattr(package.ComputeUnit, UNITS[unit]))
    except ValueError as error:
        raise NotExecutable(_line(error)) from error
    except RuntimeError as error:
        raise BuildFailed(f"Core ML refuses {path.name}: {_line(error)}") from error


def _refused(path: Path, package: Package, lines: list[str]) -> BuildFailed | NotExecutable:
    """Why coremltools came back without Core ML's model: it warns of an error, and is silent of a version."""
    warned = next((line for line in lines if "exception message was:" in line), None)
    if warned is None:
        return NotExecutable(
            f"{_system()} has no Core ML that knows specification {package.specification}; use a newer one, or export "
            f"with a lower --ios"
        )
    return BuildFailed(f"Core ML refuses {path.name}: {warned.partition('exception message was:')[2].strip()}")


def _fed(package: Package, inputs: Arrays) -> dict[str, Any]:
    """The inputs as coremltools takes them: pictures of Pillow's, arrays of float32."""
    described = {feature.name: feature for feature in package.inputs}
    if set(described) != set(inputs):
        raise UnsupportedSpec(
            f"{package.path.name} reads {', '.join(sorted(described))}, not {', '.join(sorted(inputs))}"
        )
    return {
        name: (_picture if feature.kind == "image" else _tensor)(feature, inputs[name], package.path.name)
        for name, feature in described.items()
    }


def _picture(feature: Feature, given: Array, package: str) -> Image.Image:
    """The colours are put in the package's order by Core ML, so the picture is RGB whatever that is."""
    if given.dtype != np.uint8 or given.ndim != 4 or given.shape[0] != 1 or given.shape[3] != 3:
        raise UnsupportedSpec(
            f"{package} reads {feature.name} as a picture, uint8 (1, H, W, 3), not as {given.dtype} {given.shape}"
        )
    _check_shape(feature, (1, 3, *given.shape[1:3]), package)
    return Image.fromarray(np.ascontiguousarray(given[0]))


def _tensor(feature: Feature, given: Array, package: str) -> Array:
    if given.dtype.kind != "f":
        raise UnsupportedSpec(f"{package} reads {feature.name} as {feature.dtype}, not as {given.dtype}")
    _check_shape(feature, given.shape, package)
    return np.ascontiguousarray(given, np.float32)


def _check_shape(feature: Feature, shape: tuple[int, ...], package: str) -> None:
    if not feature.takes(shape):
        raise UnsupportedSpec(f"{package} does not read {feature.name} as {' x '.join(map(str, shape))}")


def _outputs(package: Package, found: Mapping[str, Any]) -> dict[str, Array]:
    """What Core ML returned, under the names the verification asks for."""
    missing = sorted(feature.name for feature in package.outputs if feature.name not in found)
    if missing:
        raise VerificationFailed(f"Core ML returns {', '.join(map(str, found))}, and not {', '.join(missing)}")
    outputs: dict[str, Array] = {}
    label: str | None = None
    for feature in package.outputs:
        value = found[feature.name]
        if feature.kind == "dictionary":
            outputs[PROBABILITIES] = _probabilities(package, value)
        elif feature.kind == "tensor":
            outputs[feature.name] = _numbers(value)
        else:
            label = str(value)
    if label is not None and PROBABILITIES in outputs:
        _check_label(package, label, outputs[PROBABILITIES])
    return outputs


def _numbers(value: Any) -> Array:
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _probabilities(package: Package, by_label: Mapping[Any, Any]) -> Array:
    """(1, classes) in the order of the package's labels; each must be there, and no other."""
    given = {str(label): float(value) for label, value in by_label.items()}
    if given.keys() != set(package.labels):
        different = sorted(given.keys() ^ set(package.labels))
        raise VerificationFailed(
            f"Core ML returns {len(given)} labels where {package.path.name} has {len(package.labels)}; "
            f"'{different[0]}' is in one of them"
        )
    return np.array([[given[label] for label in package.labels]], np.float32)


def _check_label(package: Package, label: str, probabilities: Array) -> None:
    """Raise VerificationFailed unless no label is more probable than the one Core ML names."""
    best = package.labels[int(probabilities.argmax())]
    values = dict(zip(package.labels, probabilities[0].tolist(), strict=True))
    if label not in values or values[label] < values[best]:
        raise VerificationFailed(f"Core ML names '{label}', and '{best}' is the most probable")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
