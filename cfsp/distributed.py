"""The processes of one job, as ``torchrun`` starts them: what is whose, and what they exchange.

Work is split into contiguous parts in order of ranks, and sums are added in the order of one
process, so that what a job gives does not depend on how many there are. What is exchanged goes
over gloo from the CPU, and over NCCL from GPU to GPU where that is large.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar, cast

from .errors import CfspError, RankLost

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store

# A dead rank closes its connections; one that waits for a disk is slow.
PATIENCE = timedelta(days=7)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a job; without arguments the only one.

    Methods that exchange something are called by every rank, in the same order, and raise RankLost
    where another rank has ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    group: "ProcessGroup | None" = None
    """None: torch.distributed's default."""
    store: "Store | None" = None
    """Outlives any rank; see :meth:`speaks`."""
    backend: str = "gloo"
    """Of the group: see :func:`_backend`."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints what there is only one of."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether this is the rank that sums in order of ranks end at."""
        return self.rank == self.size - 1

    def share(self, count: int, rank: int | None = None) -> slice:
        """Which of ``count`` equal pieces of work are this rank's, or another's."""
        rank = self.rank if rank is None else rank
        return slice(-(-count * rank // self.size), -(-count * (rank + 1) // self.size))

    def weighted_share(self, weights: Sequence[int]) -> list[int]:
        """The positions of this rank's pieces of work, of about the same total for every rank."""
        total = max(1, sum(weights))
        middles = (
            2 * end - weight for weight, end in zip(weights, accumulate(weights), strict=True)
        )
        owners = (min(self.size * middle // (2 * total), self.size - 1) for middle in middles)
        return [position for position, owner in enumerate(owners) if owner == self.rank]

    def device(self, name: str) -> str:
        """This rank's own device: "auto" and "cuda" are the GPU of its local rank, which becomes
        the current one. Raises CfspError for more ranks than GPUs on this machine."""
        if self.size == 1 or name not in ("auto", "cuda"):
            return name
        import torch

        if not torch.cuda.is_available():
            return name
        if self.local_rank >= torch.cuda.device_count():
            raise CfspError(
                f"rank {self.rank} has no GPU of its own: {torch.cuda.device_count()} on this "
                "machine; give torchrun that --nproc-per-node"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def ordered_sum(self, parts: "Sequence[torch.Tensor]", like: "torch.Tensor") -> "torch.Tensor":
        """Zeros like ``like`` plus every part, in order of ranks: the additions of one process,
        hence its bits. Each rank adds its own to what the one before it hands on; on the GPU where
        that is theirs and NCCL is at hand, else on the CPU."""
        total = like.new_zeros(like.shape, device=like.device if self._device_to_device else "cpu")
        with _exchange() as dist:
            if not self.first:
                dist.recv(total, self.rank - 1, group=self.group)
            for part in parts:
                total += part.to(total.device)
            if not self.last:
                dist.send(total, self.rank + 1, group=self.group)
            if self.size > 1:
                dist.broadcast(total, self.size - 1, group=self.group)
        return total

    @property
    def _device_to_device(self) -> bool:
        """Whether tensors of a GPU need not pass through the host."""
        return self.size == 1 or "nccl" in self.backend

    def fill_(self, rows: "torch.Tensor") -> "torch.Tensor":
        """Give every rank all rows, in place, where each has those of its :meth:`share`."""
        if self.size > 1:
            with _exchange() as dist:
                for rank in range(self.size):
                    part = rows[self.share(len(rows), rank)]
                    if len(part):
                        dist.broadcast(part, rank, group=self.group)
        return rows

    def total(self, value: int) -> int:
        """Sum of every rank's value."""
        return sum(self._everyones(value))

    def most(self, value: float) -> float:
        """The largest of every rank's values."""
        return max(self._everyones(value))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return any(self._everyones(flag))

    def _everyones(self, value: Value) -> list[Value]:
        found = [value] * self.size
        if self.size > 1:
            with _exchange() as dist:
                dist.all_gather_object(found, value, group=self.group)
        return found

    def of_first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, a plain value; the others wait for it."""
        values = [make()] if self.first else [None]
        if self.size > 1:
            with _exchange() as dist:
                dist.broadcast_object_list(values, 0, group=self.group)
        return cast(Value, values[0])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with _exchange() as dist:
                dist.barrier(self.group)

    def check(self, problem: str | None) -> None:
        """Raise CfspError on every rank where one has a problem: the first one's."""
        problems = [found for found in self._everyones(problem) if found is not None]
        if problems:
            raise CfspError(problems[0])

    def check_same(self, identity: Mapping[str, object]) -> None:
        """Raise CfspError on every rank where one does not have rank 0's values; names which."""
        reference = self.of_first(lambda: dict(identity))
        other = ", ".join(sorted(key for key in reference if reference[key] != identity[key]))
        self.check(f"rank {self.rank} has another {other} than rank 0" if other else None)

    def speaks(self) -> bool:
        """Whether this rank is the one that tells the user why the job ends: the first that asks;
        no other rank needs to be alive."""
        if self.store is None:
            return self.first
        try:
            return bool(self.store.add("spoken", 1) == 1)
        except RuntimeError:  # the launcher is gone: better told twice than not at all
            return True


ALONE = Ranks()


@contextmanager
def _exchange() -> Iterator[ModuleType]:
    """torch.distributed; gloo says only that a connection failed, and as a RuntimeError."""
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError as error:
        where, _, reason = str(error).partition("] ")  # [file of gloo:line] reason. Advice.
        raise RankLost((reason or where).partition(". ")[0]) from error


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def own_rank() -> int:
    """The rank of this process, known before it has joined the others."""
    return int(os.environ["RANK"]) if launched() else 0


def _backend() -> str:
    """gloo, and NCCL for tensors of GPUs where PyTorch has both."""
    import torch
    import torch.distributed as dist

    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if has_nccl else "gloo"


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started, connected; without it, or with one, :data:`ALONE`. Where
    the program has initialised torch.distributed, they are its ranks, in a group of their own."""
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    import torch.distributed as dist

    local_rank = int(os.environ["LOCAL_RANK"])
    if dist.is_initialized():
        group = dist.new_group(timeout=PATIENCE, backend=(backend := _backend()))
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size(), local_rank, group, backend=backend)
        finally:
            dist.destroy_process_group(group)
        return
    try:
        common, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        time = common.add(f"cfsp/joined/{rank}", 1)  # joining again must not find old addresses
        store = dist.PrefixStore(f"cfsp/{time}", common)
        backend = _backend()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CfspError(f"cannot reach the other ranks of torchrun: {reason}") from None
    try:
        yield Ranks(rank, size, local_rank, store=store, backend=backend)
    finally:
        dist.destroy_process_group()
