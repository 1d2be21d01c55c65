"""The order in which artefacts are told."""

from __future__ import annotations

from nextvit_deploy.report.facts import Item, ordered
from nextvit_deploy.verdict import Verdict


def test_the_worst_come_first_and_the_exact_before_the_compressed() -> None:
    wanted = [
        Item("a", "coreml", "int8", Verdict.FAILED),
        Item("b", "onnx", "fp16", Verdict.NOT_VERIFIED),
        Item("z", "onnx", "fp32", Verdict.VERIFIED),
        Item("d", "onnx", "fp16", Verdict.VERIFIED),
        Item("e", "onnx", "int8", Verdict.VERIFIED),
        Item("f", "trt", "fp16", Verdict.VERIFIED),
        Item("g", "coreml", "fp16", Verdict.VERIFIED),
        Item("h", "coreml", "bf16", Verdict.VERIFIED),  # which no check asks for
        Item("i", "elsewhere", "fp32", Verdict.VERIFIED),
    ]
    for mixed in (wanted[::-1], wanted[4:] + wanted[:4], wanted[::2] + wanted[1::2]):
        assert [each.title for each in ordered(mixed)] == [each.title for each in wanted]
