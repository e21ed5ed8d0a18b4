"""Several processes that train one network, as ``torchrun`` starts them: equal weights, averaged gradients."""

import gc
import os
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from invdiff.errors import NumericalError, ResourceError, UsageError

_PEERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")  # in errors of collectives
_STRIDE = 1_000_003  # between the seeds of processes; those of one training are far fewer apart


@dataclass(frozen=True)
class Ranks:
    """This process among all; the methods do nothing where it is the only one.

    Attributes:
        rank: number of this process; 0 is the one that writes and speaks.
        size: number of processes.
        device: where this one computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """A seed of this process alone; that of the first is ``seed``."""
        return seed + _STRIDE * self.rank

    def shared(self, module: nn.Module) -> nn.Module:
        """``module`` with the weights of the first process, its gradients averaged over all by ``backward``."""
        if self.size == 1:
            return module
        where = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=where)

    def agree(self, elapsed_s: float, cpu_s: float, stop: bool) -> tuple[float, float, bool]:
        """Seconds of the first process, processor seconds of all, and whether any was asked to stop."""
        if self.size == 1:
            return elapsed_s, cpu_s, stop
        said = torch.tensor([elapsed_s * self.first, cpu_s, float(stop)], dtype=torch.float64, device=self.device)
        dist.all_reduce(said)
        return float(said[0]), float(said[1]), bool(said[2] > 0)

    def check_same(self, steps: int, options: Any) -> None:
        """Make sure that all processes go on from the same step with the same options.

        Raises:
            UsageError: they do not.
        """
        if self.size == 1:
            return
        said = torch.tensor([steps, zlib.crc32(repr(options).encode())], dtype=torch.float64, device=self.device)
        if not _equal(said):
            raise UsageError(
                "the processes of the training have different options, or states of different steps: start all with "
                "the same command and an output folder that they share"
            )

    def check_equal(self, tensors: Iterator[Tensor]) -> None:
        """Make sure that all processes hold the same numbers.

        Raises:
            NumericalError: they do not.
        """
        if self.size == 1:
            return
        if not _equal(torch.stack([t.detach().double().sum() for t in tensors])):
            raise NumericalError("the processes of the training have come to hold different weights: start them again")


def _equal(said: Tensor) -> bool:
    """Whether all processes say the same numbers."""
    low, high = said.clone(), said.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return torch.equal(low, high)


@contextmanager
def ranks(device: str = "cpu") -> Iterator[Ranks]:
    """The place of this process, from the environment that ``torchrun`` sets; alone without it.

    Args:
        device: ``cpu`` (processes speak by gloo) or ``cuda`` (nccl, one GPU for each process of a machine).

    Raises:
        UsageError: one GPU named for several processes, a device that is not there, or an environment that torchrun
            did not set.
        ResourceError: another of the processes has ended.
    """
    size = _world()
    place = _device(device, size)
    if size == 1:
        yield Ranks(device=place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    import_module("torch.distributed.nn.functional")  # imported later, it keeps the group as a default of its functions
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    except ValueError as error:  # RANK, MASTER_ADDR and others are missing, or no numbers
        raise UsageError(f"WORLD_SIZE is {size}, but {error}: unset it, or start with torchrun") from None
    try:
        yield Ranks(dist.get_rank(), size, place)
    except BaseException as error:
        _let_go(error)
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _PEERS):
            raise ResourceError(
                "another process of the training has ended, or cannot be reached; what was saved stays, the same "
                "command goes on"
            ) from None
        raise
    finally:
        dist.destroy_process_group()
        gc.collect()  # gloo's threads end with its last reference; one that works while Python ends aborts the process


def _let_go(error: BaseException | None) -> None:
    """Forget the variables of the functions that an exception ended: networks among them hold the process group."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _world() -> int:
    """Number of processes."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not (said.isdecimal() and 0 < int(said) <= 1_000_000):
        raise UsageError(f"WORLD_SIZE is '{said[:20]}', no number of processes: unset it, or start with torchrun")
    size, rank = int(said), os.environ.get("RANK", "0")
    if size > 1 and not (rank.isdecimal() and int(rank) < size):
        raise UsageError(f"RANK is '{rank[:20]}' of {size} processes: unset WORLD_SIZE, or start with torchrun")
    return size


def _device(name: str, size: int) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}': choose cpu or cuda[:N]") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}' cannot be trained on: choose cpu or cuda[:N]")
    if device.type == "cuda" and size > 1:
        if device.index is not None:
            raise UsageError(f"--device {name}: {size} processes cannot share it; write --device cuda")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise UsageError(f"device '{device}': this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return device
