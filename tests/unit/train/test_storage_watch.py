"""Which storages a watch hears of: those that operators make, not those they were given."""

from typing import Any

import torch
from torch import Tensor

from evomesh.train.storage_watch import StorageWatch


class StorageLog(StorageWatch):
    """Writes down what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def made(self, tensor: Tensor, operator: Any) -> None:
        self.watch(tensor.untyped_storage())
        self.events.append(f"made {tensor.numel()}")

    def resized(self, storage: torch.UntypedStorage) -> None:
        self.events.append(f"resized to {storage.nbytes()}")

    def freed(self, key: int) -> None:
        self.events.append("freed")


def test_a_storage_counts_until_its_last_tensor_is_gone() -> None:
    log = StorageLog()
    with log.watching():
        x = torch.ones(6)
        view = x.view(2, 3)[1:]
        x.add_(1)
        del x
        assert log.events == ["made 6"]
        del view
    assert log.events == ["made 6", "freed"]


def test_a_result_in_a_given_tensor_is_not_new() -> None:
    log = StorageLog()
    a = torch.ones(4)
    out = torch.zeros(4)
    with log.watching():
        torch.add(a, a, out=out)
    assert log.events == []


def test_resized_storages_are_heard_of_in_the_block_only() -> None:
    log = StorageLog()
    storage = torch.zeros(4).untyped_storage()
    with log.watching():
        storage.resize_(0)
        storage.resize_(8)
    storage.resize_(16)
    assert log.events == ["resized to 0", "resized to 8"]


def test_watching_twice_frees_once() -> None:
    log = StorageLog()
    x = torch.zeros(3)
    key = log.watch(x.untyped_storage())
    assert log.watch(x.untyped_storage()) == key
    del x
    assert log.events == ["freed"]
