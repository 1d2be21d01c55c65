"""A CUDA runtime on the host: its GPU memory is this process's own."""

# ruff: noqa: N801, N802, N815, N816 - the names are CUDA's
from __future__ import annotations

import ctypes
import enum
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

FAULT = os.environ.get("FAKE_FAULT", "")


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Properties(NamedTuple):
    name: bytes
    major: int
    minor: int


OK = cudaError_t.cudaSuccess
STREAM = 7
_memory: dict[int, Any] = {}
_events: list[float] = []


def record(name: str, *arguments: object) -> None:
    with Path(os.environ["FAKE_CALLS"]).open("a", encoding="utf-8") as calls:
        calls.write(json.dumps([name, *map(str, arguments)]) + "\n")


def cudaSetDevice(device: int) -> tuple[cudaError_t]:
    assert device == 0
    return (OK,)


def cudaGetDeviceProperties(device: int) -> tuple[cudaError_t, Properties]:
    assert device == 0
    name, _, capability = os.environ.get("FAKE_GPU", "Tesla T4:7.5").partition(":")
    return OK, Properties(name.encode() + b"\0\0", int(capability[0]), int(capability[2]))


def cudaDriverGetVersion() -> tuple[cudaError_t, int]:
    return OK, 12040


def cudaStreamCreate() -> tuple[cudaError_t, int]:
    return OK, STREAM


def cudaMalloc(size: int) -> tuple[cudaError_t, int | None]:
    record("cudaMalloc", size)
    if FAULT == "no-memory":
        return cudaError_t.cudaErrorMemoryAllocation, None
    return OK, _allocate(size)


def cudaMallocHost(size: int) -> tuple[cudaError_t, int]:
    return OK, _allocate(size)


def cudaFree(address: int) -> tuple[cudaError_t]:
    record("cudaFree", address)
    del _memory[address]
    return (OK,)


cudaFreeHost = cudaFree


def cudaMemcpyAsync(to: int, source: int, size: int, kind: cudaMemcpyKind, stream: int) -> tuple[cudaError_t]:
    assert stream == STREAM
    device = to if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else source
    assert len(_memory[device]) == size
    ctypes.memmove(to, source, size)
    return (OK,)


def cudaStreamSynchronize(stream: int) -> tuple[cudaError_t]:
    assert stream == STREAM
    return (OK,)


def cudaEventCreate() -> tuple[cudaError_t, int]:
    _events.append(0.0)
    return OK, len(_events) - 1


def cudaEventRecord(event: int, stream: int) -> tuple[cudaError_t]:
    assert stream == STREAM
    _events[event] = time.perf_counter()
    return (OK,)


def cudaEventSynchronize(event: int) -> tuple[cudaError_t]:
    assert _events[event]
    return (OK,)


def cudaEventElapsedTime(start: int, end: int) -> tuple[cudaError_t, float]:
    return OK, 1000.0 * (_events[end] - _events[start])


def _allocate(size: int) -> int:
    block = (ctypes.c_byte * size)()
    address = ctypes.addressof(block)
    _memory[address] = block
    return address
