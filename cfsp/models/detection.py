"""Layouts of architectures that none is written down for, where their structure is certain."""

from dataclasses import replace
from itertools import permutations

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from .ffns.detected_experts import stacked_ffns
from .ffns.experts import ExpertsFFN
from .ffns.ffn import FFN
from .layouts import Layout, known_layout, text_decoder, unsupported
from .modeling_cfsp import set_parameter
from .surgery import on_meta, set_buffers_
from .width_names import with_width_names

TRIAL_CHANNELS, KEPT = 8, (1, 2, 6)
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
    kinds = dict.fromkeys(
        _detect_moe(model, block) or _detect_ffn(model, block) for block in blocks
    )
    with_experts = [kind for kind in kinds if kind and isinstance(kind[0], ExpertsFFN)]
    dense = [kind for kind in kinds if kind and kind not in with_experts]
    if max(len(with_experts), len(dense)) > 1:
        raise unsupported(model.config.model_type, f"blocks with FFNs of {len(kinds)} kinds")
    layout = Layout(path, tuple(ffn for kind in (*with_experts, *dense) for ffn in kind))
    return with_width_names(model, layout)


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
        if experts is None:
            raise unsupported(family, f"{path} of {kind} does not compute what experts do")
        found.append(experts)
    if not found:
        return ()
    beside = _computed_ffns(block)
    for path, module in block.named_modules():
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


def _computes(module: nn.Module, ffn: FFN) -> bool:
    """Whether copies of the module with a few channels of random weights give the same where some
    are cut away as where the columns of down are zero for them: token by token, whatever is between
    up and down."""
    masked, cut = on_meta(module).eval(), on_meta(module).eval()
    generator, kept = torch.Generator().manual_seed(0), torch.tensor(KEPT)
    down, size = f"{ffn.down}.weight", module.get_parameter(f"{ffn.down}.weight").shape[0]
    for name, parameter in module.named_parameters():
        shape, axis = list(parameter.shape), ffn.channels.get(name)
        if axis is not None:
            shape[axis.dimension] = TRIAL_CHANNELS * axis.copies
        value = torch.randn(shape, generator=generator)
        if shape[-1:] == [size]:
            value /= size**0.5
        if name == down:
            value *= torch.zeros(TRIAL_CHANNELS).index_fill(0, kept, 1)
        own = value if axis is None else axis.cut(value, kept)
        for trial, weight in ((masked, value), (cut, own)):
            set_parameter(trial, name, nn.Parameter(weight, requires_grad=False))
    buffers = {name: value.cpu().float() for name, value in module.named_buffers()}
    for trial in (masked, cut):
        set_buffers_(trial, buffers)
        trial.__dict__.pop("forward", None)
    x = torch.randn(2, 3, size, generator=generator)
    try:
        with torch.no_grad():
            expected, found, last = masked(x), cut(x), cut(x[:, 2:])
            if any(type(y) is not torch.Tensor for y in (expected, found, last)):
                return False
            return found.shape == expected.shape == x.shape and all(
                torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
                for a, b in ((found, expected), (last, expected[:, 2:]))
            )
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError):
        return False
