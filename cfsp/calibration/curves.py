"""The error of an FFN's output as a function of its width, and its scale beside other FFNs'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile

import torch

CURVE_POINTS = 64
"""Widths of an error curve beside 0."""
ERROR_SCALES = ("output", "hidden", "absolute")
"""What errors of different blocks are measured in: the energy of the FFN's own output; that of the
block's hidden state; nothing."""
SCORES, CURVE = "{:05d}.scores", ("{:05d}.widths", "{:05d}.errors")
"""Names of a ranking's tensors in a file, of each FFN."""


@dataclass(frozen=True)
class ErrorCurve:
    """Error of one FFN's output at some widths, linear between them."""

    widths: torch.Tensor
    """[n] int64, ascending from 0 to F; of one expert."""
    errors: torch.Tensor
    """[n] fp64, mean square over tokens and the hidden axis; at width 0, of the output itself."""

    def at(self, widths: torch.Tensor) -> torch.Tensor:
        """Errors at any widths in [0, F], fp64."""
        right = torch.searchsorted(self.widths, widths).clamp(1, len(self.widths) - 1)
        low, high = self.widths[right - 1], self.widths[right]
        share = (widths - low).double() / (high - low)
        return torch.lerp(self.errors[right - 1], self.errors[right], share)


@dataclass(frozen=True)
class Ranking:
    """How a scorer ranks the channels of a model, and what their removal costs."""

    scorer: str
    compensation: str
    """The compensation that the curves count on."""
    damping: float
    scores: tuple[torch.Tensor, ...]
    """Scores of every FFN, [experts * F] fp64."""
    curves: tuple[ErrorCurve, ...] = ()
    """The error curve of every FFN; () where they were not asked for."""

    @property
    def made_by(self) -> tuple[str, str, float]:
        """What scores and curves follow from beside the statistics."""
        return self.scorer, self.compensation, self.damping

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything but the names, for a file."""
        named = {SCORES.format(ffn): scores for ffn, scores in enumerate(self.scores)}
        for ffn, curve in enumerate(self.curves):
            values = (curve.widths, curve.errors)
            named |= {name.format(ffn): x for name, x in zip(CURVE, values, strict=True)}
        return named


def ranking_of(
    made_by: tuple[str, str, float], prefix: str, tensors: Mapping[str, torch.Tensor]
) -> Ranking:
    """What :attr:`Ranking.made_by` and :meth:`Ranking.tensors` take apart, the latter under a
    prefix."""

    def each(form: str) -> list[torch.Tensor]:
        names = map((prefix + form).format, count())
        return [tensors[name] for name in takewhile(tensors.__contains__, names)]

    curves = map(ErrorCurve, *map(each, CURVE))
    return Ranking(*made_by, tuple(each(SCORES)), tuple(curves))


def curve_widths(channels: int) -> torch.Tensor:
    """Widths of an error curve, int64, ascending from 0 to F: at most 65, evenly spaced but for
    the last."""
    step = -(-channels // CURVE_POINTS)
    return torch.tensor([*range(0, channels, step), channels])


def of_experts(
    curves: Sequence[ErrorCurve], tokens: Sequence[int], block_tokens: int
) -> ErrorCurve:
    """The curve of an FFN's experts, which have one width, over all tokens of the block: each
    expert's output counts where the router sent tokens to it, before its gate."""
    pairs = zip(curves, tokens, strict=True)
    shares = [curve.errors * (count / block_tokens) for curve, count in pairs]
    return replace(curves[0], errors=torch.stack(shares).sum(0))


def hidden_energy(mse: float, cosine: float) -> float:
    """Mean square of a block's hidden state, from the mean square of its change and 1 - cos.

    1 - cos = (|y - x|^2 - (|y| - |x|)^2) / (2 |x| |y|) is |y - x|^2 / (2 |x|^2) where the norm
    changes little; this is the ratio of the two means. A block that turns nothing gives infinity.
    """
    return mse / (2 * cosine) if cosine > 0 else float("inf")


def weighted(
    curves: Sequence[ErrorCurve],
    importance: torch.Tensor,
    hidden: Sequence[float],
    scale: str,
    exponent: float,
) -> tuple[ErrorCurve, ...]:
    """Curves, one for each FFN, that may be added up over FFNs: in a scale of ERROR_SCALES, times
    importance to the power of the exponent. Importance and hidden energy are of each FFN's block.
    """
    energies = {
        "output": [float(curve.errors[0]) for curve in curves],
        "hidden": hidden,
        "absolute": [1.0] * len(curves),
    }[scale]
    powers = (importance.double().clamp_min(0) ** exponent).tolist()
    return tuple(
        replace(curve, errors=curve.errors * (power / energy if energy > 0 else 0.0))
        for curve, power, energy in zip(curves, powers, energies, strict=True)
    )
