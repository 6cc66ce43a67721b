"""Layouts of architectures that none is written down for, where their structure is certain."""

from collections.abc import Callable, Iterator
from itertools import permutations

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.activations import ACT2FN

from .ffns.detected_experts import stacked_ffns
from .ffns.detected_fused import fused_ffn
from .ffns.experts import ExpertsFFN
from .ffns.ffn import FFN, FUSED_ACTIVATIONS
from .layouts import Layout, known_layout, unsupported
from .modeling_cfsp import set_parameter
from .surgery import on_meta
from .width_names import with_width_names

TRIAL_CHANNELS = 8
TOLERANCE = 1e-4


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model, which may be on meta: the one written down, or what it shows."""
    return known_layout(model.config.model_type) or detect_layout(model)


def detect_layout(model: PreTrainedModel) -> Layout:
    """The layout of a model whose every block has one gated FFN and no other module like it, or
    experts, and gated FFNs beside them.

    A gated FFN is a module with three Linear children, two [F, D] and one [D, F], that gives
    down(act(gate(x)) * up(x)) on random input, cut to a few channels of random weights: as it
    would after pruning. Statistics are then taken at its down projection, whatever comes before.
    No values of the model are read. Raises CfspError for anything else and says what was found.
    """
    module = type(model).__module__
    ours = module == set_parameter.__module__  # a pruned model, whose family is of transformers
    if not ours and not (
        module.startswith("transformers.") and model.config.model_type in CONFIG_MAPPING
    ):
        raise unsupported(model.config.model_type, "its code is not part of transformers")
    path, blocks = _blocks(model)
    kinds = {_detect_moe(model, block) or (_detect_ffn(model, block),) for block in blocks}
    with_experts = [kind for kind in kinds if isinstance(kind[0], ExpertsFFN)]
    dense = [kind for kind in kinds if kind not in with_experts]
    if max(len(with_experts), len(dense)) > 1:
        raise unsupported(model.config.model_type, f"blocks with FFNs of {len(kinds)} kinds")
    layout = Layout(path, tuple(ffn for kind in (*with_experts, *dense) for ffn in kind))
    return with_width_names(model, layout)


def _blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The one list of as many modules as the config says the model has blocks."""
    count = model.config.get_text_config().num_hidden_layers
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    depth = min((name.count(".") for name in lists), default=0)
    outermost = [name for name in lists if name.count(".") == depth]
    if len(outermost) != 1:
        names = ", ".join(outermost) or "none"
        raise unsupported(
            model.config.model_type, f"expected one list of {count} blocks, found {names}"
        )
    return outermost[0], lists[outermost[0]]


def _detect_ffn(model: PreTrainedModel, block: nn.Module) -> FFN:
    kind, family = type(block).__name__, model.config.model_type
    candidates = [
        (path, module, roles)
        for path, module in block.named_modules()
        if (roles := _linear_children(module))
    ]
    fused = [ffn for path, module in block.named_modules() if (ffn := fused_ffn(path, module))]
    if not candidates and len(fused) == 1:
        return fused[0]
    if len(candidates) != 1:
        names = ", ".join(path or "the block itself" for path, *_ in candidates) or "none"
        reason = f"{kind} should have one module of three Linear, found {names}"
        raise unsupported(family, reason)
    path, module, roles = candidates[0]
    if "." in path or any("expert" in name for name, _ in block.named_parameters()):
        raise unsupported(family, f"{path} of {kind} is only one part of its FFN")
    if (ffn := _gated_ffn(path, module, roles)) is not None:
        return ffn
    raise unsupported(family, f"{path} of {kind} does not compute down(act(gate(x)) * up(x))")


def _detect_moe(model: PreTrainedModel, block: nn.Module) -> tuple[FFN, ...]:
    """The experts of a block and the gated FFNs beside them; nothing where it has no experts."""
    kind, family, found = type(block).__name__, model.config.model_type, list[FFN]()
    for path, experts in stacked_ffns(block):
        if experts is None:
            raise unsupported(family, f"{path} of {kind} does not compute what experts do")
        found.append(experts)
    for path, module in block.named_modules() if found else ():
        roles = _linear_children(module)
        ffn = _gated_ffn(path, module, roles) if roles else fused_ffn(path, module)
        if roles and (ffn is None or any(part.isdigit() for part in path.split("."))):
            raise unsupported(family, f"{path} of {kind} is no gated FFN of its own")
        if ffn is not None:
            found.append(ffn)
    return tuple(found)


def _gated_ffn(path: str, module: nn.Module, roles: list[tuple[str, str, str]]) -> FFN | None:
    for gate, up, down in roles:
        for activation in _activations(module):
            if _computes(module, gate, up, down, activation):
                gate, up, down = (f"{path}.{name}".lstrip(".") for name in (gate, up, down))
                return FFN(up, down, gate, activation="")
    return None


def _linear_children(module: nn.Module) -> list[tuple[str, str, str]]:
    """What may be (gate, up, down) of a module with exactly three Linear, by their shapes: two
    [F, D] and one [D, F]. A pruned block may have as many channels as D."""
    shapes = {
        name: tuple(child.weight.shape)
        for name, child in module.named_children()
        if type(child) is nn.Linear
    }
    if len(shapes) != 3 or any(list(child.children()) for child in module.children()):
        return []
    return [
        (gate, up, down)
        for gate, up, down in permutations(shapes)
        if shapes[gate] == shapes[up] == shapes[down][::-1]
    ]


Activation = Callable[[torch.Tensor], torch.Tensor]


def _activations(module: nn.Module) -> Iterator[Activation]:
    """What may be between gate and product: the module's own, or one that its code calls."""
    yield from (child for child in module.children() if type(child) is not nn.Linear)
    yield from (
        value for name, value in vars(module).items() if callable(value) and name != "forward"
    )
    yield from (ACT2FN[name] for name in FUSED_ACTIVATIONS.values())


def _computes(module: nn.Module, gate: str, up: str, down: str, activation: Activation) -> bool:
    """Whether a copy of the module with a few channels gives down(act(gate(x)) * up(x))."""
    trial = on_meta(module)
    trial.__dict__.pop("forward", None)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    width = trial.get_parameter(f"{down}.weight").shape[0]
    for name, parameter in list(trial.named_parameters()):
        shape = list(parameter.shape)
        if name != f"{down}.bias":
            shape[1 if name == f"{down}.weight" else 0] = TRIAL_CHANNELS
        value = random(*shape) / (width**0.5 if shape[-1] == width else 1)
        set_parameter(trial, name, nn.Parameter(value, requires_grad=False))
    x = random(2, 3, width)
    gate_proj, up_proj, down_proj = (trial.get_submodule(name) for name in (gate, up, down))
    try:
        with torch.no_grad():
            expected = down_proj(activation(gate_proj(x)) * up_proj(x))
            found = trial.eval()(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return False
    same = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return same and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
