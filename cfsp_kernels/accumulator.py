"""Running channel statistics that a forward hook can feed.

Bytes moved: as channel_statistics, one read of every activation.
"""

import torch

from ._dispatch import use_triton
from ._validation import as_rows
from .channel_statistics import ChannelStatistics, accumulate


class ChannelAccumulator:
    """Statistics of every channel over all the tokens it has been shown.

    Totals are fp64 on the device of the first ``x`` and nothing waits for it. An update adds
    256 tokens at a time, in order: updates that are cut at multiples of 256 tokens give the
    same bits, however many of them there are. A CUDA graph that replays an update adds its sums
    each time, but counts its tokens once, when it is captured.

    Args:
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``x``.

    Example::

        seen = ChannelAccumulator()
        handle = down_proj.register_forward_pre_hook(lambda module, args: seen.update(args[0]))
    """

    def __init__(self, *, backend: str | None = None) -> None:
        self._backend = backend
        self._totals: torch.Tensor | None = None
        self._tokens = 0

    def update(self, x: torch.Tensor) -> None:
        """Add the tokens of ``x [..., C]`` fp16, bf16 or fp32, unit stride along C.

        Raises:
            TypeError, ValueError: dtype, shape or strides that the op does not read; another
                number of channels, or another device, than before.
            RuntimeError: backend "triton" where it cannot run.
        """
        rows = as_rows("x", x)
        if self._totals is None:
            with torch.inference_mode(False):  # else no update outside of the mode could add to it
                totals = torch.zeros(2, rows.shape[1], dtype=torch.float64, device=x.device)
        else:
            totals = self._totals
        if rows.shape[1] != totals.shape[1] or x.device != totals.device:
            raise ValueError(
                f"x has {rows.shape[1]} channels on {x.device}, earlier updates had "
                f"{totals.shape[1]} on {totals.device}"
            )
        accumulate(rows, totals, None, use_triton("ChannelAccumulator", x, self._backend))
        self._totals = totals
        self._tokens += rows.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return self._tokens

    @property
    def statistics(self) -> ChannelStatistics:
        """The sums so far, copied: later updates leave them alone.

        Raises:
            ValueError: no update yet.
        """
        if self._totals is None:
            raise ValueError("the accumulator has seen no tensor: is its hook registered?")
        total, squares = self._totals.clone()
        return ChannelStatistics(self._tokens, total, squares)

    @property
    def mean(self) -> torch.Tensor:
        """[C] fp64, mean of x over tokens; NaN without tokens."""
        return self.statistics.sum / self._tokens if self._tokens else self.norm * torch.nan

    @property
    def variance(self) -> torch.Tensor:
        """[C] fp64, population variance of x over tokens; NaN without tokens.

        Its relative error is at most 2^-16 * (1 + mean^2 / variance) (256 fp32 additions).
        """
        if not self._tokens:
            return self.norm * torch.nan
        _, total, squares = self.statistics
        mean = total / self._tokens
        return (squares / self._tokens - mean * mean).clamp_min(0)

    @property
    def norm(self) -> torch.Tensor:
        """[C] fp64, L2 norm of x over tokens."""
        return self.statistics.sum_of_squares.sqrt()
