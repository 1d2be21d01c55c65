from __future__ import annotations

import argparse
import io
import pickle
from collections import OrderedDict
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from torch import nn

from nextvit_models._pickles import foreign_imports


def imports_of(data: bytes) -> tuple[str, ...]:
    return foreign_imports(io.BytesIO(data))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_names_at_every_protocol(protocol: int) -> None:
    contents = {"args": argparse.Namespace(path=PurePosixPath("a")), "again": argparse.Namespace()}
    path = f"{PurePosixPath.__module__}.PurePosixPath"  # pathlib._local since Python 3.13
    assert imports_of(pickle.dumps(contents, protocol)) == ("argparse.Namespace", path)


@pytest.mark.parametrize("protocol", [0, 1])
def test_names_at_the_oldest_protocols(protocol: int) -> None:
    found = imports_of(pickle.dumps(argparse.Namespace(a=1), protocol))
    assert {"argparse.Namespace", "copy_reg._reconstructor"} <= set(found)


def test_plain_values_and_state_dicts_import_nothing_foreign() -> None:
    state: OrderedDict[str, object] = OrderedDict(
        a=torch.ones(2, dtype=torch.bfloat16), b=nn.Parameter(torch.ones(1)), c=torch.Size([1]), d={1, 2}, e=b"x"
    )
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    assert [foreign_imports(buffer) for _ in range(5)] == [()] * 5


def test_numbers_of_numpy_are_foreign() -> None:
    assert any(name.endswith("multiarray.scalar") for name in imports_of(pickle.dumps(np.float64(0.5))))


def test_an_instance_opcode() -> None:
    assert imports_of(b"(S'true'\nios\nsystem\n.") == ("os.system",)


def test_a_name_from_the_memo() -> None:
    """STACK_GLOBAL with its strings fetched from the memo; those pushed last are others."""
    data = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x8c\x01a\x8c\x01b0000h\x00h\x01\x93."
    assert imports_of(data) == ("os.system",)


def test_a_name_that_is_only_computed() -> None:
    assert imports_of(b"\x80\x04\x8c\x02os]\x93.") == ("os.<computed>",)


def test_an_extension_code() -> None:
    assert imports_of(b"\x80\x02\x82\x07.") == ("<extension 7>",)


@pytest.mark.parametrize("data", [b"", b"\x80\x02}", b"\xff\xfe", b"\x80\x02\x8a\xff1."])
def test_damaged_opcodes(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        imports_of(data)
