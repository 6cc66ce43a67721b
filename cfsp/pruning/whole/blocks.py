"""Which whole blocks go: one stretch, by the angle that it turns the hidden states by, or by the
loss of the model without it.

Errors of single blocks do not add up once several are gone, so that blocks are never chosen one by
one.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from cfsp_kernels import block_influence

from ...calibration.grams import Split
from ...calibration.statistics import INFLUENCE_METRICS
from ...distributed import Ranks
from ...errors import CfspError
from ...models.blockwise import record_block_calls, run_block
from ...models.depth import first_fixed, shallower_description
from ...models.descriptions import Description
from ...models.layouts import Layout, pass_on
from ...models.surgery import forward_instead

MOST_STATES = 2 << 30
"""Bytes of hidden states that wait for the end of their stretches: of fewer windows, where all
would take more."""


def blocks_left(described: Description, blocks: int) -> int:
    """How many blocks of a model stay where ``blocks`` do, or go if it is negative. Raises
    CfspError where that is not one of 2 to all, or where it takes blocks that have to stay."""
    total = len(described.units)
    left = blocks if blocks > 0 else total + blocks
    if not 2 <= left <= total:
        raise CfspError(
            f"blocks {blocks}: a model of {total} keeps 2 to {total}, or loses up to {total - 2}"
        )
    first = max(1, first_fixed(described.model.config))
    if left < min(first + 1, total):
        raise CfspError(f"blocks {blocks}: the first {first} and the last one have to stay")
    return left


def without_stretch(total: int, start: int, count: int) -> tuple[int, ...]:
    """The numbers of all blocks but ``count`` of them from ``start`` on."""
    return (*range(start), *range(start + count, total))


def best_stretch(described: Description, left: int, values: Sequence[float]) -> tuple[int, ...]:
    """The blocks that stay where the stretch of the least of ``values``, which are of
    :func:`stretches`, goes, the first of equal ones: of those that the model's own class can be
    without. Raises CfspError where there are none."""
    total, refusal = len(described.units), None
    if left == total:
        return tuple(range(total))
    starts = stretches(described, left)
    for _, start in sorted(zip(values, starts, strict=True)):
        kept = without_stretch(total, start, total - left)
        try:
            shallower_description(described, kept)
        except CfspError as error:
            refusal = refusal or error
            continue
        return kept
    raise refusal or CfspError(f"no stretch of {total - left} blocks can go")


def stretches(described: Description, left: int) -> range:
    """Where stretches may begin: neither the first nor the last block ever goes, nor one that is
    given features of images."""
    return range(max(1, first_fixed(described.model.config)), left)


def any_stretch(described: Description, left: int) -> tuple[int, ...]:
    """The blocks that stay in a model as large as the one to come: a late stretch goes."""
    starts = stretches(described, left)
    return best_stretch(described, left, [-start for start in starts])


def angle_windows(described: Description, left: int, windows: int, seqlen: int) -> int:
    """How many of ``windows`` the angles are of, one at least, by :data:`MOST_STATES`."""
    text = described.model.config.get_text_config()
    states = seqlen * text.hidden_size * described.model.dtype.itemsize
    waiting = len(described.units) - left + 1
    return min(windows, max(1, MOST_STATES // (waiting * states)))


class StretchAngles:
    """Calibration windows [N, S] int64 on their way through all blocks, and the angle by which
    every stretch of ``count`` of these turns the hidden states.

    Memory beside the model: the hidden states of this rank's windows once on the device, and
    ``count`` times on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        windows: torch.Tensor,
        count: int,
        micro_batch: int,
        ranks: Ranks,
    ) -> None:
        self.blocks, self.count, self.ranks = blocks, count, ranks
        self.tokens = windows.numel()
        count_of, seqlen = windows.shape
        split = Split(count_of, seqlen, micro_batch)
        self.share = ranks.share(split.micro_batches)
        own = windows[self.share.start * micro_batch : self.share.stop * micro_batch]
        self.calls = record_block_calls(model, blocks, own, micro_batch)
        self.sums = torch.zeros(
            len(blocks) - count + 1,
            split.micro_batches,
            len(INFLUENCE_METRICS),
            dtype=torch.float64,
        )
        """Of every stretch and micro-batch."""
        self.before: deque[torch.Tensor] = deque(maxlen=count)
        """Inputs of the last blocks, on the host."""

    def ride(self, number: int) -> None:
        """Go through one block, whose weights are in memory."""
        hidden = self.calls.hidden
        self.before.append(hidden.to("cpu", copy=True))
        run_block(self.blocks[number], number, self.calls, lambda *_: None)
        if len(self.before) < self.count:
            return
        sums = self.sums[number - self.count + 1][self.share]
        inputs = self.before[0].split(self.calls.micro_batch)
        for (index, states), given in zip(self.calls.micro_batches(), inputs, strict=False):
            found = torch.empty(len(INFLUENCE_METRICS), dtype=torch.float64, device=hidden.device)
            block_influence(given.to(hidden.device), states, out=found)
            sums[index] = found.cpu()

    def angles(self) -> list[float]:
        """Of the stretches from every block on, in half turns: means over all tokens, the same on
        every rank. Raises CfspError for NaN or infinity."""
        sums = torch.stack([self.ranks.fill_(own.contiguous()) for own in self.sums])
        found = sums.sum(1)[:, INFLUENCE_METRICS.index("angular")] / self.tokens
        if not found.isfinite().all():
            raise CfspError("a block gave NaN or infinite activations: use another dtype")
        return [float(value) for value in found]


def stretch_losses(
    model: PreTrainedModel,
    layout: Layout,
    starts: Sequence[int],
    count: int,
    measure: Callable[[], float],
    *,
    progress: bool = False,
) -> list[float]:
    """What ``measure`` gives of a model in memory without each stretch of ``count`` blocks, in
    evaluation mode; the model is left as it was found."""
    blocks, training, found = layout.find_blocks(model), model.training, []
    model.eval()
    for start in tqdm(starts, desc="depth", unit="model", disable=not progress):
        gone = blocks[start : start + count]
        with forward_instead(gone, [partial(pass_on, block) for block in gone]):
            found.append(measure())
    model.train(training)
    return found
