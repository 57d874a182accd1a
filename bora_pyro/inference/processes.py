"""The processes of one fit: each owns some of the tasks, with their adapters and documents; all share Θ.

>>> one = Processes()
>>> one.rank, one.size
(0, 1)
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.errors import InputError
from bora_pyro.files.row_file import RowTensor

T = TypeVar("T")


class Processes:
    """One process alone: sums are what they are, and there is nobody to gather from.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        reduced_bytes: bytes that this process has put into sums so far.
    """

    rank, size = 0, 1
    reduced_bytes = 0
    #: Whether all must pass through the base together, each holding a part of it.
    sharded_base = False

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in place."""
        return value

    def gather_rows(self, store: RowTensor, own: Tensor) -> None:
        """Let rank 0 have the rows of all processes; ``own`` are this one's."""

    def lockstep(self, work: Iterable[T]) -> Iterator[T | None]:
        """The pieces of work, each one pass through the base; where all pass together, None while others have more."""
        yield from work

    def first(self, act: Callable[[], T]) -> T | None:
        """What ``act`` gives in the process of rank 0, which the others wait for; None there.

        Raises:
            InputError: rank 0 could not, in all processes.
        """
        return act()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Say farewell to the others."""


class Group(Processes):
    """Processes that ``torchrun`` has started: torch.distributed underneath, NCCL on CUDA and gloo elsewhere."""

    def __init__(self, device: torch.device) -> None:
        # not NCCL alone: what is gathered for a checkpoint lies on the CPU
        if device.type == "cuda":
            torch.cuda.set_device(device)  # FSDP takes the current one
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # the others wait for what the first does alone; where one fails, torchrun ends all
        dist.init_process_group(backend, timeout=timedelta(days=1))
        self.rank, self.size, self.reduced_bytes = dist.get_rank(), dist.get_world_size(), 0

    def all_reduce(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        self.reduced_bytes += value.numel() * value.element_size()
        return value

    def gather_rows(self, store: RowTensor, own: Tensor) -> None:
        chunks = own.split(64)
        if self.rank:
            self._send(torch.tensor([len(chunks)]))
            for index in chunks:
                self._send(torch.tensor([len(index)]))
                self._send(index)
                self._send(store.read(index).cpu().contiguous())
                store.release_memory()
            return
        for source in range(1, self.size):
            for _ in range(int(self._receive(torch.empty(1, dtype=torch.int64), source))):
                size = int(self._receive(torch.empty(1, dtype=torch.int64), source))
                index = self._receive(torch.empty(size, dtype=torch.int64), source)
                store.write(index, self._receive(store.read(index).cpu(), source))
                store.release_memory()

    @staticmethod
    def _send(value: Tensor) -> None:
        dist.send(value, 0)

    @staticmethod
    def _receive(value: Tensor, source: int) -> Tensor:
        dist.recv(value, source)
        return value

    def lockstep(self, work: Iterable[T]) -> Iterator[T | None]:
        if not self.sharded_base:
            yield from work
            return
        pieces = iter(work)
        while True:
            piece = next(pieces, None)
            busy = torch.tensor([int(piece is not None)])
            dist.all_reduce(busy)
            if not busy.item():
                return
            yield piece

    def first(self, act: Callable[[], T]) -> T | None:
        result, error = None, None
        if not self.rank:
            try:
                result = act()
            except InputError as found:
                error = found
        failed = torch.tensor([float(error is not None)])
        dist.all_reduce(failed)
        if failed.item():
            raise error or InputError("the first process has refused")
        return result

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            dist.barrier()
        elif issubclass(kind, InputError):
            # most are met by all alike, and the first one's line is to be read before torchrun ends it
            with suppress(RuntimeError):
                dist.monitored_barrier(timeout=timedelta(seconds=10))
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that speaks and writes: the only one, or that of rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def processes(device: torch.device) -> Processes:
    """The processes that this one was started with: those of ``torchrun``, or this one alone."""
    return Group(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes()


def partition_tasks(tokens: Tensor, size: int) -> list[Tensor]:
    """The tasks of each process, dealt out so that all have about as many tokens: the longest first, to who has least.

        >>> partition_tasks(torch.tensor([5, 0, 9, 4]), 2)
        [tensor([1, 2]), tensor([0, 3])]

    Args:
        tokens: (D,) training tokens of each task.
        size: number of processes.

    Raises:
        InputError: more processes than tasks with documents.
    """
    with_documents = int((tokens > 0).sum())
    if size > with_documents:
        raise InputError(
            f"{size} processes for {with_documents} tasks with training documents; each needs one of its own, so start "
            f"{with_documents} or fewer (torchrun --nproc_per_node)"
        )
    load = [(0, 0, rank) for rank in range(size)]
    of_rank: list[list[int]] = [[] for _ in range(size)]
    for task in tokens.argsort(descending=True, stable=True).tolist():
        total, number, rank = heapq.heappop(load)
        of_rank[rank].append(task)
        heapq.heappush(load, (total + int(tokens[task]), number + 1, rank))
    return [torch.tensor(sorted(tasks)) for tasks in of_rank]


def all_reduce_gradient(processes: Processes, shared: Sequence[Parameter], own: Sequence[Parameter], sums: Tensor) -> Tensor:
    """Add the gradient of ``shared`` and ``sums`` up over the processes, in one message; the norm of the whole gradient."""
    squares = _squares(own, sums)
    if processes.size > 1:
        for parameter in shared:  # where this process had no document
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [parameter.grad for parameter in shared if parameter.grad is not None]
        if gradients:  # tasks that are independent share nothing
            message = processes.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, message.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        numbers = processes.all_reduce(torch.cat([sums, squares[None]]))
        sums.copy_(numbers[:-1])
        squares = numbers[-1]
    return (squares + _squares(shared, sums)).sqrt().float()


def _squares(parameters: Sequence[Parameter], like: Tensor) -> Tensor:
    """The squared norm of a gradient, of the kind of ``like``."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).to(like).square() if gradients else like.new_zeros(())
