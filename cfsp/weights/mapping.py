"""Stored names to those of a model's tensors and back, through transformers' own mapping.

The functions of transformers that are used here come without a promise of stability:
tests/weights/test_mapping.py compares every family with what ``from_pretrained`` loads.
"""

import copy
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..errors import CfspError, first_of, reason
from ..io.safetensors import TensorInfo, Tensors
from .sources import Convert, Source, Weight

REMADE = re.compile(r"\b(inv_freq|position_ids|(attn|attention)\.(masked_)?bias)$")
"""Buffers that older checkpoints hold and every model makes itself."""
EXPERTS_APART: tuple[list[tuple[type, int]], ...] = (
    [(MergeModulelist, 0)],
    [(MergeModulelist, 0), (Concatenate, 1)],
)
"""Conversions of which each stored tensor is a contiguous part of the parameter."""


def sources_of(
    where: str | Path, skeleton: PreTrainedModel, weights: Mapping[str, Weight]
) -> dict[str, Source]:
    """Tensor of a model -> what it is made of, in the order in which transformers takes the stored
    ones. The model then knows the way back: see :func:`converted`.

    Raises CfspError for stored tensors that have no place in the model or the same one, that are
    no plain numbers, or of other shapes than the config says; warns of those that transformers
    leaves out on purpose.
    """
    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    groups: dict[str, dict[str | None, list[str]]] = {}
    homeless = []
    for name in sorted(weights, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state:
            target, pattern = (name if name in state else target), None
        if target in state:
            groups.setdefault(target, {}).setdefault(pattern, []).append(name)
        else:
            homeless.append(name)
    _check_homeless(where, skeleton, homeless)
    if weights:
        skeleton._weight_conversions = [entry for entry in mapping if entry.was_used()]
    owners = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    found: dict[str, Source] = {}
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    for target, names in groups.items():
        if target in parameters:
            _check_floats(where, {n: weights[n] for own in names.values() for n in own})
        converter = owners.get(next(iter(names)) or "")
        if converter is None or None in names:
            source = _renamed(where, target, names, weights)
        else:
            source = _converted_source(where, target, names, weights, converter, skeleton)
        for name, info in source.targets.items():
            if name not in state:
                raise CfspError(f"{where}: {type(skeleton).__name__} has no {name}")
            _check_shape(where, name, info.shape, tuple(state[name].shape))
            source.targets[name] = TensorInfo(state[name].dtype, info.shape)
            if name in found:
                raise _twice(where, *(next(iter(x.weights)) for x in (found[name], source)))
            found[name] = source
    return found


def _renamed(
    where: str | Path,
    target: str,
    names: Mapping[str | None, list[str]],
    weights: Mapping[str, Weight],
) -> Source:
    name, *others = chain.from_iterable(names.values())
    if others:
        raise _twice(where, name, others[-1])
    return Source({target: weights[name]}, {name: weights[name]})


def _twice(where: str | Path, name: str, other: str) -> CfspError:
    return CfspError(f"{where}: {name} and {other} of the weights are one parameter")


def _converted_source(
    where: str | Path,
    target: str,
    names: Mapping[str | None, list[str]],
    weights: Mapping[str, Weight],
    converter: WeightConverter,
    skeleton: PreTrainedModel,
) -> Source:
    """What a converter makes of weights: joined where they are experts apart."""
    own = {name: weights[name] for name in chain.from_iterable(names.values())}
    shapes = {weight.shape for weight in own.values()}
    lists = [names.get(pattern, []) for pattern in converter.source_patterns]
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    if steps in EXPERTS_APART and len({len(names) for names in lists}) > 1:
        counts = ", ".join(str(len(names)) for names in lists)
        what = " and ".join(converter.source_patterns)
        raise CfspError(f"cannot load {where}: {target} needs as many {what}, got {counts}")
    for pattern, listed in zip(converter.source_patterns, lists, strict=True):
        if "experts.*." in pattern:
            _check_numbers(where, target, listed)
        elif "*" not in pattern and len(listed) > 1:
            raise _twice(where, listed[0], listed[-1])
    if steps in EXPERTS_APART and len(shapes) == 1:
        in_order = {name: own[name] for name in chain.from_iterable(zip(*lists, strict=True))}
        ((rows, *rest),) = [shape or (1,) for shape in shapes]
        shape = (len(lists[0]), rows * len(lists), *rest)
        return Source({target: TensorInfo(torch.float32, shape)}, in_order)
    convert = partial(_convert, converter, target, names, skeleton)
    try:
        made = convert({k: torch.empty(w.shape, device="meta") for k, w in own.items()})
    except Exception as error:  # of whatever kind an operation raises
        raise CfspError(
            f"{where}: cannot make {target} of {first_of(own)}: {reason(error)}"
        ) from error
    infos = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in made.items()}
    return Source(infos, own, convert)


def _check_numbers(where: str | Path, target: str, experts: Collection[str]) -> None:
    """Raise CfspError where one is missing between others, which would take its place."""
    for number, name in enumerate(experts):
        if re.findall(r"\.(\d+)\.", name)[-1:] != [str(number)]:
            raise CfspError(f"cannot load {where}: {target} needs expert {number}, found {name}")


def _convert(
    converter: WeightConverter,
    target: str,
    names: Mapping[str | None, list[str]],
    model: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    own = copy.deepcopy(converter)  # it collects what it converts
    for pattern, listed in names.items():
        for name in listed:
            own.add_tensor(target, name, pattern, tensors[name])
    made = own.convert(target, model=model, config=model.config)
    return {k: value[0] if isinstance(value, list) else value for k, value in made.items()}


def retargeted(convert: Convert, renamed: Callable[[str], str]) -> Convert:
    """The same conversion, for a tensor of another name in the model."""
    if not isinstance(convert, partial):
        raise TypeError(f"a conversion of another kind: {convert}")
    converter, target, *others = convert.args
    return partial(convert.func, converter, renamed(target), *others)


def _check_floats(where: str | Path, weights: Mapping[str, Weight]) -> None:
    for name, weight in weights.items():
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            kind = str(weight.dtype).removeprefix("torch.")
            raise CfspError(
                f"{where} is quantised: {name} is stored as {kind}, and its config does not say "
                "how: dequantise it first"
            )


def _check_shape(
    where: str | Path, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    if stored != wanted:
        raise CfspError(
            f"cannot load {where}: {name} is {list(stored)} in the weights, {list(wanted)} by the "
            "config"
        )


def _check_homeless(where: str | Path, skeleton: PreTrainedModel, names: Collection[str]) -> None:
    ignored = skeleton._keys_to_ignore_on_load_unexpected or ()
    left = [name for name in names if not REMADE.search(name)]
    unknown = [name for name in left if not any(re.search(pattern, name) for pattern in ignored)]
    kind = type(skeleton).__name__
    if unknown:
        raise CfspError(
            f"{where}: its weights and config.json do not belong together: "
            f"{kind} has no place for {first_of(unknown)}"
        )
    if left:
        text = f"{first_of(left)} of {where} is left out of the result: {kind} does not use it"
        warnings.warn(text, stacklevel=2)


def converted(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model under the names and in the shapes of its checkpoint, or of its family's:
    those of its modules, but for experts, which are apart there."""
    found = revert_weight_conversion(model, dict(tensors))
    return {name: found[name] for name in tensors} if found.keys() == tensors.keys() else found


class WayBack:
    """The names and places of a pruned model's tensors in its checkpoint, known before any is."""

    def __init__(
        self,
        model: PreTrainedModel,
        sources: Mapping[str, Source],
        tensors: Tensors,
        block_of: Callable[[str], int | None],
    ) -> None:
        """``model``: the pruned one, which may be on meta; ``tensors``: what it has, in order;
        ``block_of``: number of the block that a tensor is in, None: it is in none."""
        self._model = model
        empty = {k: torch.empty(x.shape, dtype=x.dtype, device="meta") for k, x in tensors.items()}
        written = converted(model, empty)
        self.planned = {k: TensorInfo(x.dtype, tuple(x.shape)) for k, x in written.items()}
        self._apart = {
            name: tuple(sources[name].weights)
            for name in tensors
            if name in sources and len(sources[name].weights) > 1 and not sources[name].convert
            if self.planned.keys() >= sources[name].weights.keys()
        }
        by_block: dict[int | None, dict[str, torch.Tensor]] = {}
        for name, value in empty.items():
            by_block.setdefault(block_of(name), {})[name] = value
        self.block_of = {k: block for block, own in by_block.items() for k in self(own)}
        """Of every name in the checkpoint."""
        if self.block_of.keys() != self.planned.keys():
            other = first_of(sorted(self.block_of.keys() ^ self.planned.keys()))
            raise CfspError(f"{type(model).__name__} cannot be written block by block: {other}")

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of one block, or of none, as they are written; experts are not copied."""
        found: dict[str, torch.Tensor] = {}
        others = dict(tensors)
        for name in [name for name in tensors if name in self._apart]:
            value, names = others.pop(name), self._apart[name]
            rows = value.shape[1] * value.shape[0] // len(names)
            parts = value.view(len(names), rows, *value.shape[2:])
            found |= dict(zip(names, parts, strict=True))
        return {**converted(self._model, others), **found}
