"""Layouts of architectures that none is written down for, where their structure is certain."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.activations import ACT2FN

from ..layouts import Layout, known_layout, text_decoder, unsupported
from ..modeling_cfsp import set_parameter
from ..parts.experts import ExpertsFFN
from ..parts.ffn import FFN, FUSED_ACTIVATIONS
from ..surgery import on_meta, set_buffers_
from .fused import fused_ffn
from .stacked import stacked_ffns
from .width_names import with_width_names

TRIAL_CHANNELS = 8
TOLERANCE = 1e-4
COMPUTED = "down(act(gate(x)) * up(x)) or down(act(up(x)))"


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model, which may be on meta: the one written down, or what it shows."""
    text = model.config.get_text_config()
    known = known_layout(text.model_type)
    if known is None:
        return detect_layout(model)
    return known if text is model.config else replace(known, blocks=_blocks(model)[0])


def detect_layout(model: PreTrainedModel) -> Layout:
    """The layout of a model whose blocks have one FFN, or experts and FFNs beside them, or none of
    them, and nothing else like it.

    An FFN is a module with two or three Linear children that gives down(act(gate(x)) * up(x)), gate
    and up apart or together, or down(act(up(x))), on random input, cut to a few channels of random
    weights: as it would after pruning. Statistics are then taken at its down projection, whatever
    comes before. No values of the model are read. Raises CfspError for anything else and says what
    was found.
    """
    module = type(model).__module__
    ours = module == set_parameter.__module__  # a pruned model, whose family is of transformers
    if not ours and not (
        module.startswith("transformers.") and model.config.model_type in CONFIG_MAPPING
    ):
        raise unsupported(model.config.model_type, "its code is not part of transformers")
    path, blocks = _blocks(model)
    unlike = {_structure(block): block for block in reversed(blocks)}
    kinds = dict.fromkeys(
        _detect_moe(model, block) or _detect_ffn(model, block)
        for block in reversed(unlike.values())
    )
    with_experts = [kind for kind in kinds if kind and isinstance(kind[0], ExpertsFFN)]
    dense = [kind for kind in kinds if kind and kind not in with_experts]
    if max(len(with_experts), len(dense)) > 1:
        raise unsupported(model.config.model_type, f"blocks with FFNs of {len(kinds)} kinds")
    layout = Layout(path, tuple(ffn for kind in (*with_experts, *dense) for ffn in kind))
    return with_width_names(model, layout)


def _structure(block: nn.Module) -> tuple[tuple[str, object], ...]:
    """The same for blocks of the same modules with parameters of the same shapes."""
    modules = [(name, type(module)) for name, module in block.named_modules()]
    shapes = [(name, parameter.shape) for name, parameter in block.named_parameters()]
    return (*modules, *shapes)


def _blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The one list of as many modules as the config says the text decoder has blocks."""
    count = model.config.get_text_config().num_hidden_layers
    prefix, decoder = text_decoder(model)
    lists = {
        f"{prefix}.{name}".lstrip("."): module
        for name, module in decoder.named_modules()
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


def _detect_ffn(model: PreTrainedModel, block: nn.Module) -> tuple[FFN, ...]:
    """The one FFN of a block; nothing where it has none, as those of a hybrid that only mix
    tokens."""
    kind, family = type(block).__name__, model.config.model_type
    found = _computed_ffns(block)
    parts = [path for path in found if "." in path or _has_experts(block)]
    if parts:
        raise unsupported(family, f"{', '.join(parts)} of {kind} is only one part of its FFN")
    if _has_experts(block):
        raise unsupported(family, f"{kind} has experts of an unknown form")
    if len(found) > 1:
        raise unsupported(family, f"{kind} should have one FFN, found {', '.join(found)}")
    alike = [path or "the block itself" for path, m in block.named_modules() if _possible_ffns(m)]
    if alike and not found:
        raise unsupported(family, f"{', '.join(alike)} of {kind} does not compute {COMPUTED}")
    return tuple(found.values())


def _detect_moe(model: PreTrainedModel, block: nn.Module) -> tuple[FFN, ...]:
    """The experts of a block and the FFNs beside them; nothing where it has no experts."""
    kind, family, found = type(block).__name__, model.config.model_type, list[FFN]()
    for path, experts in stacked_ffns(block):
        if experts is not None:
            found.append(experts)
        elif _has_experts(block):
            raise unsupported(family, f"{path} of {kind} does not compute what experts do")
    if not found:
        return ()
    beside = _computed_ffns(block)
    for path, module in block.named_modules():
        if path not in beside and (fused := fused_ffn(path, module)) is not None:
            beside[path] = fused  # with an activation of its own
        listed = path in beside and any(part.isdigit() for part in path.split("."))
        gated = any(ffn.gate is not None for ffn in _possible_ffns(module))
        if listed or (gated and path not in beside):
            raise unsupported(family, f"{path} of {kind} is no FFN of its own")
    return (*found, *beside.values())


def _computed_ffns(block: nn.Module) -> dict[str, FFN]:
    """The FFN of every module of a block that computes one, by its path."""
    found = {}
    for path, module in block.named_modules():
        for ffn in _possible_ffns(module):
            if _computes(module, ffn):
                found[path] = _placed(path, ffn)
                break
    return found


def _has_experts(block: nn.Module) -> bool:
    return any("expert" in name for name, _ in block.named_parameters())


def _placed(path: str, ffn: FFN) -> FFN:
    """An FFN of a module at a path."""
    prefix = f"{path}." if path else ""
    gate = prefix + ffn.gate if ffn.gate is not None else None
    return replace(ffn, up=prefix + ffn.up, down=prefix + ffn.down, gate=gate)


def _possible_ffns(module: nn.Module) -> list[FFN]:
    """What a module with two or three Linear and no parameters of its own may be, by their shapes:
    down is [D, F], gate and up are [F, D], or one [2F, D]. A pruned block may have as many channels
    as D."""
    shapes = {
        name: tuple(child.weight.shape)
        for name, child in module.named_children()
        if type(child) is nn.Linear
    }
    nested = any(list(child.children()) for child in module.children())
    if len(shapes) not in (2, 3) or nested or list(module.parameters(recurse=False)):
        return []
    found = []
    for *gates, up, down in permutations(shapes):
        size, width = shapes[down]
        if all(shapes[name] == (width, size) for name in (*gates, up)):
            found.append(FFN(up, down, next(iter(gates), None), activation=""))
        elif not gates and shapes[up] == (2 * width, size):
            found.append(FFN(up, down, None, activation="", fused=True))
    return found


Activation = Callable[[torch.Tensor], torch.Tensor]


def _activations(module: nn.Module) -> Iterator[Activation]:
    """What an FFN may put its gate through: the module's own, or one that its code calls."""
    linear = (nn.Linear, nn.Dropout, nn.Identity)
    yield from (child for child in module.children() if type(child) not in linear)
    yield from (
        value for name, value in vars(module).items() if callable(value) and name != "forward"
    )
    yield from (ACT2FN[name] for name in FUSED_ACTIVATIONS.values())


def _computes(module: nn.Module, ffn: FFN) -> bool:
    """Whether a copy of the module with a few channels computes what the FFN says."""
    trial = on_meta(module).eval()
    trial.__dict__.pop("forward", None)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    size = trial.get_parameter(f"{ffn.down}.weight").shape[0]
    for name, parameter in list(trial.named_parameters()):
        shape = list(parameter.shape)
        if name in ffn.channels:
            axis = ffn.channels[name]
            shape[axis.dimension] = axis.size(TRIAL_CHANNELS)
        value = random(*shape) / (size**0.5 if shape[-1] == size else 1)
        set_parameter(trial, name, nn.Parameter(value, requires_grad=False))
    set_buffers_(trial, {name: value.cpu().float() for name, value in module.named_buffers()})
    x = random(2, 3, size)
    up_proj, down_proj = (trial.get_submodule(name) for name in (ffn.up, ffn.down))

    def expected(act: Activation) -> torch.Tensor:
        if ffn.gate is not None:
            return down_proj(act(trial.get_submodule(ffn.gate)(x)) * up_proj(x))
        if ffn.fused:
            gate, up = up_proj(x).chunk(2, dim=-1)
            return down_proj(act(gate) * up)
        return down_proj(act(up_proj(x)))

    with torch.no_grad():
        found = _attempt(trial, x)
        others = (_attempt(expected, act) for act in _activations(trial))
        return found is not None and any(
            other is not None
            and other.shape == found.shape
            and torch.allclose(found, other, rtol=TOLERANCE, atol=TOLERANCE)
            for other in others
        )


def _attempt(function: Callable[..., object], argument: object) -> torch.Tensor | None:
    """What a function gives; None where that is no tensor, or it takes other arguments."""
    try:
        found = function(argument)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError):
        return None
    return found if isinstance(found, torch.Tensor) else None
