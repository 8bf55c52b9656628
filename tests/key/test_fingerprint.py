"""Digests and facts about machine and toolchain."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_handlers.key import fingerprint
from ts_handlers.key.fingerprint import digest_file, digest_tensors, libraries, tensor_specification

tensors = st.dictionaries(
    st.sampled_from(["a", "b", "ab"]),
    st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from([torch.float32, torch.int32, torch.bfloat16])),
)


def make(values: dict[str, tuple[list[int], torch.dtype]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(items).to(dtype) for name, (items, dtype) in values.items()}


@given(st.binary(max_size=100), st.integers(0, 3))
def test_file_digest_is_sha256_at_any_size(tmp_path_factory: pytest.TempPathFactory, data: bytes, times: int) -> None:
    path = tmp_path_factory.getbasetemp() / "digested"
    content = data * (times * 20_000 + 1)
    path.write_bytes(content)
    assert digest_file(path) == hashlib.sha256(content).hexdigest()


@given(tensors, tensors)
def test_tensor_digests_are_equal_exactly_when_the_tensors_are(
    a: dict[str, tuple[list[int], torch.dtype]], b: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    assert (digest_tensors(make(a)) == digest_tensors(make(b))) == (a == b)
    specification = [{name: (len(items), dtype) for name, (items, dtype) in values.items()} for values in (a, b)]
    same = specification[0] == specification[1]
    assert (tensor_specification(make(a)) == tensor_specification(make(b))) == same


def test_tensor_digest_sees_values_and_not_memory_layout() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    assert digest_tensors({"w": values.t().contiguous().t()}) == digest_tensors({"w": values})
    assert digest_tensors({"w": torch.tensor(1.0)}) == digest_tensors({"w": torch.nn.Parameter(torch.tensor(1.0))})


def test_libraries_leave_out_what_is_keyed_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    facts = libraries(["os", "torch", "ts_handlers", "numpy", "beside", "absent_module"], search=tmp_path)
    names = [fact.partition("=")[0] for fact in facts.split()]
    assert names == ["absent_module", "numpy"]
    assert "absent_module=absent" in facts


def test_import_name_may_differ_from_the_distributions_name() -> None:
    pytest.importorskip("PIL", reason="pillow is not installed")
    assert libraries(["PIL"]).startswith("PIL=pillow-")


def test_machine_facts_are_stable_and_name_what_matters() -> None:
    cpu = torch.device("cpu")
    assert fingerprint.device_identity(cpu) == fingerprint.device_identity(cpu)
    assert torch.__version__ in fingerprint.toolchain("cpu")
    assert "/" not in fingerprint.device_slug(cpu)
    assert " " not in fingerprint.device_slug(cpu)
