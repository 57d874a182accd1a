"""The processes of one fit. Each process has some of the tasks, with their adapters and documents; all processes share Θ.

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
    """A single process: a sum over processes is the value itself, and there are no rows to gather.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        reduced_bytes: bytes that this process has contributed to sums so far.
    """

    rank, size = 0, 1
    reduced_bytes = 0
    #: Whether each process holds a part of the base, so that all processes must run it at the same time.
    sharded_base = False

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place, and return it."""
        return value

    def gather_rows(self, store: RowTensor, own: Tensor) -> None:
        """Copy the rows of all processes to rank 0; ``own`` are the rows of this process."""

    def lockstep(self, work: Iterable[T]) -> Iterator[T | None]:
        """Yield the items of ``work``, each of which is one pass through the base.

        With a sharded base all processes yield equally often: a process without further items yields None.
        """
        yield from work

    def first(self, act: Callable[[], T]) -> T | None:
        """Run ``act`` in the process of rank 0 while the others wait; return its result there, and None elsewhere.

        Raises:
            InputError: ``act`` raised it in rank 0; all processes then raise one.
        """
        return act()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the group of processes."""


class Group(Processes):
    """Processes started by ``torchrun``, which communicate by torch.distributed: NCCL on CUDA, gloo otherwise."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # FSDP uses the current device
        # gloo on CUDA too: rows that are gathered for a checkpoint are on the CPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # a long timeout: other processes wait while the first works alone; if one fails, torchrun ends all
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
            raise error or InputError("the first process failed; see its error message")
        return result

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            dist.barrier()
        elif issubclass(kind, InputError):
            # usually all processes raise the same error; wait, so that the first can print it before torchrun ends it
            with suppress(RuntimeError):
                dist.monitored_barrier(timeout=timedelta(seconds=10))
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that logs and writes files: the only process, or the one of rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def processes(device: torch.device) -> Processes:
    """The processes of this run: those started by ``torchrun``, or this process alone."""
    return Group(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes()


def partition_tasks(tokens: Tensor, size: int) -> list[Tensor]:
    """Divide the tasks among the processes, so that all have about the same number of tokens.

    Tasks are assigned in order of decreasing tokens, each to the process with the fewest tokens so far.

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
    """Sum the gradients of ``shared`` and the tensor ``sums`` over the processes; return the norm of the whole gradient.

    Args:
        processes: the processes.
        shared: parameters that all processes have; their gradients are summed in place, in one message.
        own: parameters of this process's tasks; their gradients only enter the norm.
        sums: other numbers to sum, in place.
    """
    squares = _squares(own, sums)
    if processes.size > 1:
        for parameter in shared:  # a process without documents in this step has no gradient
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [parameter.grad for parameter in shared if parameter.grad is not None]
        if gradients:  # independent tasks share no parameters
            message = processes.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, message.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        numbers = processes.all_reduce(torch.cat([sums, squares[None]]))
        sums.copy_(numbers[:-1])
        squares = numbers[-1]
    return (squares + _squares(shared, sums)).sqrt().float()


def _squares(parameters: Sequence[Parameter], like: Tensor) -> Tensor:
    """The squared norm of the gradient, with the device and precision of ``like``."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).to(like).square() if gradients else like.new_zeros(())
