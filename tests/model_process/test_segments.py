"""Tensors through shared memory, both ends in one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ts_handlers.model_process.segments import SMALLEST, Inbox, Outbox
from ts_handlers.model_process.wire import TensorSpec

TENSORS = [
    torch.arange(6, dtype=torch.int64).reshape(2, 3),
    torch.tensor(2.5),
    torch.tensor([[True], [False]]),
    torch.randn(3, 5).to(torch.bfloat16),
    torch.randn(4, 6)[:, ::2],  # not contiguous
    torch.empty(0, 7),
    torch.tensor([1 + 2j]),
    torch.tensor([1 + 2j]).conj(),
    torch.tensor([1 + 2j]).conj().imag,  # a negation that is carried out when it is read
    torch.randn(8).to(torch.float8_e4m3fn),
]


def transfer(outbox: Outbox, inbox: Inbox, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    specs, descriptor = outbox.write(tensors)
    if descriptor is not None:
        inbox.replace(descriptor)
    return inbox.read(specs)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_every_kind_of_tensor_arrives() -> None:
    found = transfer(Outbox(), Inbox(), TENSORS)
    for before, after in zip(TENSORS, found, strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert torch.equal(after.to(torch.complex64), before.to(torch.complex64))


def test_the_next_message_takes_the_same_memory() -> None:
    outbox, inbox = Outbox(), Inbox()
    (first,) = transfer(outbox, inbox, [torch.zeros(3)])
    specs, descriptor = outbox.write([torch.ones(3)])
    assert descriptor is None
    assert torch.equal(inbox.read(specs)[0], torch.ones(3))
    assert torch.equal(first, torch.ones(3))  # which is why a caller gets copies


def test_larger_tensors_get_larger_memory_and_nothing_stays_open() -> None:
    before = descriptors()
    outbox, inbox = Outbox(), Inbox()
    small = transfer(outbox, inbox, [torch.ones(4)])
    large = torch.arange(SMALLEST, dtype=torch.int32)
    (found,) = transfer(outbox, inbox, [large])
    assert torch.equal(found, large)
    assert torch.equal(small[0], torch.ones(4))  # views of the memory before keep it
    specs, descriptor = outbox.write([torch.ones(4)])
    assert descriptor is None
    assert torch.equal(inbox.read(specs)[0], torch.ones(4))
    del small, found
    outbox.close()
    inbox.close()
    assert descriptors() == before


def test_memory_is_prepared_and_given_back_once() -> None:
    prepared: list[int] = []
    undone: list[int] = []

    def prepare(memory: torch.Tensor) -> object:
        prepared.append(memory.nbytes)
        return lambda: undone.append(memory.nbytes)

    outbox = Outbox(prepare)  # type: ignore[arg-type]
    inbox = Inbox(prepare)  # type: ignore[arg-type]
    transfer(outbox, inbox, [torch.ones(4)])
    transfer(outbox, inbox, [torch.ones(SMALLEST)])
    assert prepared == [SMALLEST, SMALLEST, 4 * SMALLEST, 4 * SMALLEST]
    assert undone == [SMALLEST, SMALLEST]
    outbox.close()
    inbox.close()
    outbox.close()
    assert sorted(undone) == sorted(prepared)


@pytest.mark.parametrize(
    "spec",
    [TensorSpec("float32", (SMALLEST,), 0), TensorSpec("float32", (1,), SMALLEST), TensorSpec("float32", (1,), -64)],
)
def test_what_lies_outside_the_memory_is_refused(spec: TensorSpec) -> None:
    outbox, inbox = Outbox(), Inbox()
    with pytest.raises(ValueError, match="no shared memory"):
        inbox.read((spec,))
    transfer(outbox, inbox, [torch.ones(4)])
    with pytest.raises(ValueError, match="do not lie in shared memory"):
        inbox.read((spec,))


def test_layouts_of_many_sizes_do_not_pile_up() -> None:
    outbox, inbox = Outbox(), Inbox()
    for size in range(1, 300):
        assert transfer(outbox, inbox, [torch.full((size,), float(size))])[0].sum() == size * size
    assert max(len(outbox._views), len(inbox._views)) <= 64


def test_memory_whose_size_is_not_sealed_is_refused_and_closed(tmp_path: Path) -> None:
    before = descriptors()
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, SMALLEST)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, SMALLEST)
    for descriptor in (loose, file):
        with pytest.raises(ValueError, match="not sealed"):
            Inbox().replace(descriptor)
    assert descriptors() == before
    _, descriptor = Outbox().write([torch.ones(3)])
    assert descriptor is not None
    for size in (0, 2 * SMALLEST):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)
