"""Gated FFNs whose gate and up are one Linear, where their structure is certain."""

from itertools import permutations

import torch
from torch import nn

from ..modeling_cfsp import set_parameter
from ..parts.ffn import FFN
from ..surgery import on_meta

TRIAL_CHANNELS, KEPT = 8, (1, 2, 6)
TOLERANCE = 1e-4


def fused_ffn(path: str, module: nn.Module) -> FFN | None:
    """The FFN of a module with exactly two Linear, [2F, D] and [D, F], whatever it computes between
    them: cut to some of a few channels of random weights, it gives what it does with the columns
    of down at zero for the others."""
    shapes = {n: c.weight.shape for n, c in module.named_children() if type(c) is nn.Linear}
    for up, down in permutations(shapes) if len(shapes) == 2 else ():
        ffn = FFN(up, down, gate=None, activation="", fused=True)
        if shapes[up] == (2 * shapes[down][1], shapes[down][0]) and _is_of_channels(module, ffn):
            up, down = (f"{path}.{name}".lstrip(".") for name in (up, down))
            return FFN(up, down, gate=None, activation="", fused=True)
    return None


def _is_of_channels(module: nn.Module, ffn: FFN) -> bool:
    masked, cut = on_meta(module).eval(), on_meta(module).eval()
    generator, kept = torch.Generator().manual_seed(0), torch.tensor(KEPT)
    down = f"{ffn.down}.weight"
    width = module.get_parameter(down).shape[0]
    for name, parameter in module.named_parameters():
        shape, axis = list(parameter.shape), ffn.channels.get(name)
        if axis is not None:
            shape[axis.dimension] = axis.size(TRIAL_CHANNELS)
        value = torch.randn(shape, generator=generator) / (width**0.5 if shape[-1] == width else 1)
        if name == down:
            value *= torch.zeros(TRIAL_CHANNELS).index_fill(0, kept, 1)
        own = value if axis is None else axis.cut(value, kept)
        for trial, weight in ((masked, value), (cut, own)):
            set_parameter(trial, name, nn.Parameter(weight, requires_grad=False))
            trial.__dict__.pop("forward", None)
    x = torch.randn(2, 3, width, generator=generator)
    try:
        with torch.no_grad():
            expected, found = masked(x), cut(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return False
    same = isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor)
    same = same and found.shape == expected.shape == x.shape
    return same and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
