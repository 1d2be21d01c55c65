"""What TensorRT says while it works: its log, kept line by line, and its progress.

TensorRT's error recorder is not used: together with the ONNX parser it crashes the interpreter when both are
destroyed. Errors come through the log all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from nextvit_exporters.tensorrt.backends import Module

_SEVERITIES: Final = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
_SEVERE: Final = frozenset({"INTERNAL_ERROR", "ERROR"})
_MANY: Final = 3
"""How many of TensorRT's complaints one message holds."""


@dataclass(slots=True)
class BuildLog:
    """Everything TensorRT logged, in order; each entry is (severity, text)."""

    entries: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The log's lines, each entry's first one with its severity."""
        return [line for severity, text in self.entries for line in f"{severity} {text}".splitlines()]

    def reason(self) -> str:
        """The first errors on one line, or that there is none."""
        texts = [" ".join(text.split()) for severity, text in self.entries if severity in _SEVERE]
        return "; ".join(list(dict.fromkeys(texts))[:_MANY]) or "it gave no reason"


def logger(module: Module, log: BuildLog) -> Any:
    """A TensorRT logger that fills ``log``."""

    class Listener(module.ILogger):  # type: ignore[misc]  # the module is known at run time only
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.names = {int(getattr(module.ILogger.Severity, name)): name for name in _SEVERITIES}

        def log(self, severity: object, msg: str) -> None:
            log.entries.append((self.names[int(severity)], msg))  # type: ignore[call-overload]  # an enum of theirs

    return Listener()


@dataclass(slots=True)
class Interruption:
    """What was raised, or the signal that came, while TensorRT was at work.

    Neither can be unwound through TensorRT, which swallows what its listeners raise and builds on, so it waits here.
    """

    raised: BaseException | None = None
    signals: list[int] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        """Whether something waits, so that the build is to be stopped."""
        return self.raised is not None or bool(self.signals)

    def again(self) -> None:
        """Raise what waits, if anything does."""
        if self.raised is not None:
            raise self.raised


def monitor(module: Module, on_step: Callable[[str], None], interruption: Interruption) -> Any:
    """A TensorRT progress monitor that tells ``on_step``, and stops the build when that raises."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the module is known at run time only
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase
            self.steps[phase_name] = num_steps
            self._tell(f"TensorRT: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.steps.get(phase_name, 0)
            return self._tell(f"TensorRT: {phase_name} {100 * (step + 1) // total} %" if total else phase_name)

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def _tell(self, text: str) -> bool:
            if not interruption.pending:
                try:
                    on_step(text)
                except BaseException as error:  # noqa: BLE001 - raised again as soon as TensorRT has let go
                    interruption.raised = error
            return not interruption.pending

    return Monitor()
