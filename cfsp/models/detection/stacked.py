"""Experts of families that none are written down for, where their structure is certain."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import torch
from torch import nn
from torch.nn.functional import linear

from ..modeling_cfsp import set_parameter
from ..parts.experts import ExpertsFFN
from ..surgery import on_meta

TRIAL_TOKENS, TRIAL_EXPERTS, TRIAL_CHANNELS = 5, 3, 8
KEPT = (1, 2, 6)
"""Some of the trial's channels."""
TOLERANCE = 1e-4


def stacked_ffns(block: nn.Module) -> Iterator[tuple[str, ExpertsFFN | None]]:
    """(path, experts) of every module of a block with matrices of experts in 3-D parameters; None
    where a copy with a few experts and channels, of random weights, computes something else."""
    for path, module in block.named_modules():
        stacks = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if len(stacks) < 2:
            continue
        fits = (ffn for ffn in _readings(stacks) if _computes(module, ffn))
        found = next(fits, None) if len(stacks) == 2 else None
        if found is not None:
            up, down = (f"{path}.{name}" for name in found.weight_names)
            found = replace(found, up=up, down=down)
        yield path, found


def _readings(stacks: dict[str, nn.Parameter]) -> Iterator[ExpertsFFN]:
    """What two 3-D parameters may be by their shapes."""
    for (up, down), transposed in product(permutations(stacks), (False, True)):
        experts, out, into = stacks[up].mT.shape if transposed else stacks[up].shape
        other, width, channels = stacks[down].mT.shape if transposed else stacks[down].shape
        fused = out == 2 * channels
        if (other, width) != (experts, into) or not (fused or out == channels):
            continue
        for activation, interleaved, routed in product(
            ("act_fn", ""), (False, True) if fused else (False,), (True, False)
        ):
            if fused or activation:
                yield ExpertsFFN(
                    up,
                    down,
                    activation=activation,
                    fused=fused,
                    transposed=transposed,
                    interleaved=interleaved,
                    routed=routed,
                )


def _computes(module: nn.Module, ffn: ExpertsFFN) -> bool:
    """Whether a small copy of the module gives what the experts would, channel by channel."""
    trial, generator = on_meta(module), torch.Generator().manual_seed(0)
    trial.__dict__.pop("forward", None)
    if config := getattr(trial, "config", None):
        config._experts_implementation = "eager"
    axes = ffn.channels
    for name, parameter in list(trial.named_parameters()):
        shape = list(parameter.shape)
        if name in axes or name == f"{ffn.down}_bias":
            shape[0] = min(TRIAL_EXPERTS, shape[0])
        if name in axes:
            shape[axes[name].dimension] = axes[name].size(TRIAL_CHANNELS)
        value = torch.randn(shape, generator=generator)
        if name == ffn.up:
            value /= shape[1 + (not ffn.transposed)] ** 0.5
        set_parameter(trial, name, nn.Parameter(value, requires_grad=False))
    try:
        with torch.no_grad():
            return _same_output(trial.eval(), ffn, generator) and _by_channel(trial, ffn, generator)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError):
        return False


def _same_output(trial: nn.Module, ffn: ExpertsFFN, generator: torch.Generator) -> bool:
    """Whether the copy gives the sum of each token's experts by their shares."""
    parameters = dict(trial.named_parameters())
    up, down = (parameters[n].mT if ffn.transposed else parameters[n] for n in ffn.weight_names)
    none = [None] * len(down)
    up_bias, down_bias = (parameters.get(f"{name}_bias", none) for name in ffn.weight_names)
    experts, width = len(down), down.shape[1]
    x = torch.randn(TRIAL_TOKENS, width, generator=generator)
    shares = torch.rand(TRIAL_TOKENS, 2, generator=generator)
    chosen = (torch.arange(TRIAL_TOKENS)[:, None] + torch.arange(2)) % experts

    def expert(number: int, x: torch.Tensor) -> torch.Tensor:
        inner = ffn.activated(trial, linear(x, up[number], up_bias[number]))
        return linear(inner, down[number], down_bias[number])

    if ffn.routed:
        found = trial(x, chosen, shares)
        of_each = torch.stack([expert(number, x) for number in range(experts)], 1)
        routed = of_each[torch.arange(TRIAL_TOKENS)[:, None], chosen]
        expected = (routed * shares[..., None]).sum(1)
    else:
        every = torch.randn(experts, TRIAL_TOKENS, width, generator=generator)
        found = trial(every.flatten(0, 1))
        expected = torch.cat([expert(number, x) for number, x in enumerate(every)])
    same = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return same and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _by_channel(trial: nn.Module, ffn: ExpertsFFN, generator: torch.Generator) -> bool:
    """Whether some channels are activated alone as they are among all."""
    axis, kept = ffn.channels[ffn.up], torch.tensor(KEPT)
    both = torch.randn(TRIAL_TOKENS, axis.size(TRIAL_CHANNELS), generator=generator)
    alone = ffn.activated(trial, both[:, axis.places(kept, TRIAL_CHANNELS)])
    return torch.allclose(
        alone, ffn.activated(trial, both)[:, kept], rtol=TOLERANCE, atol=TOLERANCE
    )
