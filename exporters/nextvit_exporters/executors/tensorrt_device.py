"""TensorRT itself on a GPU: the saved engine, executed by what will run it.

Memory is taken once, at the largest shapes that any profile takes. What the engine does not write can't look right:
the outputs' memory holds NaN before every run. After the stages of ``run`` one by one, ``bench`` can time them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nextvit_exporters.cuda.driver import probe_driver
from nextvit_exporters.cuda.loading import (
    check_backend,
    check_device,
    check_tensors,
    check_version,
    create_context,
    load_engine,
    profiles,
    tensor_names,
)
from nextvit_exporters.cuda.memory import Bytes, Cuda, Graph, open_cuda
from nextvit_exporters.cuda.plan import BufferPlan, Profile, Shape, Tensor, choose_profile, dtype_of, plan_buffers
from nextvit_exporters.errors import BuildFailed, DeployError, UnsupportedSpec
from nextvit_exporters.executors.base import Array, Arrays
from nextvit_exporters.tensorrt.backends import Module, backend, load
from nextvit_exporters.tensorrt.header import read_header
from nextvit_exporters.tensorrt.listening import BuildLog

if TYPE_CHECKING:
    from typing_extensions import Self

_UNWRITTEN: Final = 0xFF
"""A byte; filled with it, FP16 and float32 are NaN, and integers -1 or their largest."""


class TensorRTDevice:
    """Executes a saved engine on the first GPU.

    ``backend_name`` is a name in ``tensorrt.backends.BACKENDS`` and ``cuda_name`` one in ``cuda.memory.CUDA_NAMES``.
    With ``graph`` the engine is captured into a CUDA graph at the first run of a shape and launched as that.

    Entering raises, in this order: BuildFailed when the file is no engine of this backend, or of another version than
    the one installed; NoDevice without a CUDA driver and a GPU; MissingExtra without the packages; BuildFailed when it
    is for another GPU, or TensorRT or CUDA refuse it; UnsupportedSpec for tensors that can't be filled.
    """

    mode = "device"

    def __init__(self, path: Path, backend_name: str, cuda_name: str = "cuda-bindings", *, graph: bool = False) -> None:
        self.path = path
        self.cuda: Cuda = open_cuda(cuda_name)
        self.profiles: tuple[Profile, ...] = ()
        self.plan: BufferPlan = plan_buffers(())
        self._backend = backend(backend_name)
        self._graph = graph
        self._held = ExitStack()
        self._log = BuildLog()
        self._module: Module = None
        self._engine: Any = None
        self._context: Any = None
        self._profile = 0
        self._captured: Graph | None = None
        self._shapes: Mapping[str, Shape] = {}
        self._actual: Mapping[str, Shape] = {}
        self._block = 0
        self._pinned: Bytes = np.empty(0, np.uint8)

    @property
    def name(self) -> str:
        """``tensorrt 10.13.3.9 on Tesla T4``, or what of it is missing; known before it is entered."""
        try:
            version = load(self._backend).__version__
        except DeployError:
            version = "(not installed)"
        devices = probe_driver().devices
        return f"{self._backend.name} {version} on {devices[0].name if devices else 'no GPU'}"

    def __enter__(self) -> Self:
        header = read_header(self.path)
        check_backend(self.path, header, self._backend)
        if find_spec(self._backend.module) is not None:
            check_version(self.path, header, load(self._backend).__version__)
        device = probe_driver().first()
        self._module = load(self._backend)
        check_device(self.path, header, device)
        with ExitStack() as held:
            held.enter_context(self.cuda)
            held.callback(self._forget)
            self._engine = load_engine(self._module, self.path, self._log)
            check_tensors(self._module, self._engine)
            self._context = create_context(self._module, self._engine, self._log)
            self.profiles = profiles(self._module, self._engine)
            self.plan = plan_buffers(self._measure())
            self._block = self.cuda.allocate(self.plan.size)
            self._pinned = self.cuda.pin(self.plan.size)
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name, as new arrays; the executor must have been entered.

        Raises BuildFailed for inputs of another name or type, or when the engine can't be executed, and
        UnsupportedSpec for a shape that no profile takes.
        """
        if self._context is None:
            raise RuntimeError("the executor is closed; use it in a with statement")
        self.stage(inputs)
        self.upload()
        self.execute()
        self.download()
        self.cuda.synchronize()
        return self.outputs()

    def stage(self, inputs: Arrays) -> None:
        """Set the inputs' shapes and lay the inputs into page-locked memory; raises as ``run`` does."""
        self._check(inputs)
        self._shape_for({name: values.shape for name, values in inputs.items()})
        for name, values in inputs.items():
            np.copyto(self._view(name), values)
        for name, slot in self.plan.slots.items():
            if not slot.tensor.is_input:
                host = self._bytes(name)
                host[...] = _UNWRITTEN
                self.cuda.upload(self._block + slot.offset, host)

    def upload(self) -> None:
        """Put the copies of the inputs to the GPU on the stream."""
        for name, slot in self.plan.slots.items():
            if slot.tensor.is_input:
                self.cuda.upload(self._block + slot.offset, self._bytes(name))

    def execute(self) -> None:
        """Put the engine on the stream, as a graph where that was asked for; raises as ``run`` does."""
        if self._graph and self._captured is None:
            self._captured = self._capture()
        if self._captured is not None:
            self._captured.launch()
        else:
            self._enqueue()

    def download(self) -> None:
        """Put the copies of the outputs from the GPU on the stream."""
        for name, slot in self.plan.slots.items():
            if not slot.tensor.is_input:
                self.cuda.download(self._bytes(name), self._block + slot.offset)

    def outputs(self) -> dict[str, Array]:
        """What was downloaded last, by name, as new arrays; the stream must have finished."""
        return {name: self._view(name).copy() for name, slot in self.plan.slots.items() if not slot.tensor.is_input}

    def transferred(self) -> tuple[int, int]:
        """Bytes that one run at the shapes set last moves to the GPU and back."""
        sizes = {name: self._bytes(name).nbytes for name in self.plan.slots}
        up = sum(size for name, size in sizes.items() if self.plan.slots[name].tensor.is_input)
        return up, sum(sizes.values()) - up

    def _measure(self) -> list[Tensor]:
        """All tensors at the largest shape any profile gives them: TensorRT is asked with each one's largest inputs."""
        largest: dict[str, Shape] = {}
        for profile in self.profiles:
            self._switch(profile.index)
            self._set_shapes({name: high for name, (_, _, high) in profile.shapes.items()})
            for name in tensor_names(self._engine):
                shape = tuple(self._context.get_tensor_shape(name))
                largest[name] = max(shape, largest.get(name, shape), key=math.prod)
        inputs = {name for profile in self.profiles for name in profile.shapes}
        return [
            Tensor(name, dtype_of(name, self._engine.get_tensor_dtype(name).name), name in inputs, shape)
            for name, shape in largest.items()
        ]

    def _check(self, inputs: Arrays) -> None:
        wanted = {name: slot.tensor for name, slot in self.plan.slots.items() if slot.tensor.is_input}
        if set(wanted) != set(inputs):
            raise BuildFailed(f"{self.path.name} reads {', '.join(sorted(wanted))}, not {', '.join(sorted(inputs))}")
        for name, tensor in wanted.items():
            if inputs[name].dtype != tensor.dtype:
                raise BuildFailed(f"'{name}' of {self.path.name} is {tensor.dtype}, not {inputs[name].dtype}")

    def _shape_for(self, shapes: Mapping[str, Shape]) -> None:
        """Make the context ready for inputs of these shapes, where it is not."""
        if shapes == self._shapes:
            return
        profile = choose_profile(self.profiles, shapes)
        self._forget_shapes()
        self._switch(profile.index)
        for name, slot in self.plan.slots.items():
            self._accept(self._context.set_tensor_address(name, self._block + slot.offset), f"the address of '{name}'")
        self._set_shapes(shapes)
        self._actual = {name: tuple(self._context.get_tensor_shape(name)) for name in self.plan.slots}
        self._shapes = dict(shapes)

    def _switch(self, index: int) -> None:
        """Use that profile, from the stream's next work on; a new context uses the first."""
        if index != self._profile:
            self._accept(self._context.set_optimization_profile_async(index, self.cuda.stream), f"profile {index}")
        self._profile = index

    def _set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            self._accept(self._context.set_input_shape(name, shape), f"{shape} for '{name}'")

    def _capture(self) -> Graph:
        """The engine as a graph; it is executed once before, for then TensorRT settles what a capture must not hold."""
        self._enqueue()
        self.cuda.synchronize()
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX alone tells
        if capturable is not None and not capturable(self.cuda.stream):
            raise UnsupportedSpec(f"{self.path.name} can't be captured into a CUDA graph at this shape; drop --graph")
        return self.cuda.capture(self._enqueue)

    def _enqueue(self) -> None:
        self._accept(self._context.execute_async_v3(self.cuda.stream), "to execute the engine")

    def _accept(self, accepted: object, what: str) -> None:
        if not accepted:
            raise BuildFailed(f"TensorRT refuses {what}: {self._log.reason()}")

    def _bytes(self, name: str) -> Bytes:
        """A tensor's page-locked memory at its present shape."""
        slot = self.plan.slots[name]
        size = math.prod(self._actual[name]) * slot.tensor.dtype.itemsize
        return self._pinned[slot.offset : slot.offset + size]

    def _view(self, name: str) -> Array:
        return self._bytes(name).view(self.plan.slots[name].tensor.dtype).reshape(self._actual[name])

    def _forget(self) -> None:
        """Let go of all that lives in the GPU's memory, once nothing runs; the memory itself is freed next."""
        with suppress(BuildFailed):  # told by the memory's own end
            self.cuda.synchronize()
        with suppress(BuildFailed):
            self._forget_shapes()
        self._context = self._engine = None
        self._profile, self._block, self._pinned = 0, 0, np.empty(0, np.uint8)

    def _forget_shapes(self) -> None:
        captured = self._captured
        self._captured, self._shapes, self._actual = None, {}, {}
        if captured is not None:
            captured.close()
