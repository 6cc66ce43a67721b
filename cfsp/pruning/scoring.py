"""Scores [F] of one FFN's channels: pure functions of its statistics and, where needed, weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cfsp_kernels import channel_importance

from ..calibration.statistics import BlockStatistics
from ..errors import CfspError
from ..models.parts.channels import PartWeights
from .obs import removal_order

Weights = Callable[[], PartWeights]
"""Gives the matrices of one FFN. A score that does not call it reads no weights, and nothing loads
them for it."""
ScoreFunction = Callable[[BlockStatistics, Weights, float], torch.Tensor]
"""(statistics, weights, damping of least squares) -> scores [F] fp64 on the CPU."""


@dataclass(frozen=True)
class Scorer:
    """A way to score channels, and what its authors use it with."""

    score: ScoreFunction
    allocator: str
    compensation: str
    summary: str
    reads_weights: bool = True
    needs_gram: bool = False
    of_ffns: bool = False
    """Whether it reads matrices that only an FFN has."""


def activation_norm(statistics: BlockStatistics, weights: Weights, damping: float) -> torch.Tensor:
    """n_i, the L2 norm of the channel's activation. Reads no weights.

    It is the score of the released CFSP too (three_w_one_wa with b = c = 1): the mean over j of
    (|W_down| n / colsum + |W_up|^T / colsum + |W_gate|^T / colsum) n. Every normalised column sums
    to one, whatever the weights: what is left is 3 / D times n, and the constant changes no order.
    """
    return statistics.norm


def _kernel_score(name: str, statistic: str = "", *matrices: str) -> ScoreFunction:
    """A score of :func:`channel_importance`; of down alone, where no matrix is named."""

    def score(statistics: BlockStatistics, weights: Weights, damping: float) -> torch.Tensor:
        ffn = weights()
        given = {matrix: getattr(ffn, matrix) for matrix in matrices or ("down",)}
        if statistic:
            value = statistics.norm if statistic == "norms" else statistics.variance
            given[statistic] = value.to(ffn.down.device)
        return channel_importance(name, **given).double().cpu()

    return score


def moments_of(statistics: BlockStatistics, reader: str, *, centred: bool = False) -> torch.Tensor:
    """[F, F] X^T X / T over the fitting tokens, or the covariance. Raises CfspError without."""
    if statistics.gram is None:
        raise CfspError(
            f"{reader} is made in a calibration, which these statistics had for another: calibrate "
            "with this recipe"
        )
    return statistics.gram.moments(centred=centred)


def obs(statistics: BlockStatistics, weights: Weights, damping: float) -> torch.Tensor:
    """When greedy removal takes the channel, see :func:`cfsp.pruning.obs.removal_order`."""
    down = weights().down
    return removal_order(down, moments_of(statistics, "scorer 'obs'"), damping).scores


def flap(statistics: BlockStatistics, weights: Weights, damping: float) -> torch.Tensor:
    """variance_i ||W[:, i]||^2; squared for attention, as its released code has it."""
    score = _kernel_score("flap", "variance")(statistics, weights, damping)
    return score.square() if weights().up is None else score


def cfsp_output(statistics: BlockStatistics, weights: Weights, damping: float) -> torch.Tensor:
    """n_i ||W_down[:, i]||^1/2: half way, in logarithms, from the norm of the channel's activation
    to that of what it adds to the output."""
    magnitude = channel_importance("magnitude", down=weights().down).double().cpu()
    return statistics.norm * magnitude.sqrt()


EVERY_MATRIX = ("gate", "up", "down")
SCORERS: dict[str, Scorer] = {
    "cfsp": Scorer(
        activation_norm, "cfsp", "none", "released CFSP; equals the activation norm", False
    ),
    "cfsp-eq8": Scorer(
        _kernel_score("eq8", "norms", *EVERY_MATRIX),
        "cfsp",
        "none",
        "Eq. 8 of the paper at second hand: down normalised over channels",
        of_ffns=True,
    ),
    "cfsp-output": Scorer(
        cfsp_output,
        "cfsp-filled",
        "least-squares",
        "activation norm times the root of the norm of the column of down; best with least squares",
    ),
    "cfsp-balanced": Scorer(
        _kernel_score("balanced", "norms", *EVERY_MATRIX),
        "cfsp",
        "none",
        "gate, up and down all normalised over channels, so that no term is constant",
        of_ffns=True,
    ),
    "activation-norm": Scorer(activation_norm, "cfsp", "none", "L2 norm of the activation", False),
    "wanda-sp": Scorer(
        _kernel_score("wanda", "norms"), "global", "none", "mean |W_down| times activation norm"
    ),
    "flap": Scorer(
        flap,
        "global",
        "bias",
        "activation variance times squared norm of the column of down; published with units "
        "channels,groups",
    ),
    "wifn": Scorer(
        _kernel_score("wanda", "norms"), "global", "bias", "wanda-sp with bias compensation"
    ),
    "magnitude-sp": Scorer(
        _kernel_score("magnitude"), "uniform", "none", "L2 norm of the column of down"
    ),
    "obs": Scorer(
        obs,
        "knapsack",
        "least-squares",
        "greedy removal of the channel that costs the output least after a refit (OBS)",
        needs_gram=True,
    ),
}
"""Scorer by name; each with the allocator and compensation that it is published with."""
