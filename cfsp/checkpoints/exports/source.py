"""The model that is exported: opened, its tensors in turn, and what formats ask about it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...errors import CfspError
from ...io.safetensors import read_index, read_tensors
from ...models.blocks import LiveBlocks
from ...models.layouts import PRUNED_PREFIX
from ...models.loading import load_config
from ...models.opening import OpenModel, open_any
from ...models.tensors import saved_tensors, tensor_infos
from ...vllm_plugin import NATIVE_FAMILIES, NO_HEADS_PER_BLOCK
from ...weights.mapping import converted
from ..folder import write_tensors

Change = Callable[[nn.Module], None]
"""Changes a block in place, the same for a block with and without values."""
Details = dict[str, Any]
"""What a format has to say of what it wrote."""


@dataclass(frozen=True)
class ExportOptions:
    """What a user may ask of a format; None where nothing was said."""

    type: str | None = None
    pre: str | None = None
    multiple: int | None = None


@dataclass(frozen=True)
class ExportSource:
    """A model to export; ``widths``: FFN channels of every block."""

    path: str | Path
    opened: OpenModel
    widths: tuple[int, ...]

    @property
    def config(self) -> Any:
        return self.opened.model.config

    @property
    def family(self) -> str:
        """``model_type`` of the architecture that it was before it was pruned."""
        return self.config.model_type.removeprefix(PRUNED_PREFIX)

    @property
    def settings(self) -> dict[str, Any]:
        """``cfsp_config`` of its config.json, see :mod:`models.modeling_cfsp`."""
        return getattr(self.config, "cfsp_config", None) or {}

    @property
    def added_bias(self) -> Sequence[str]:
        """Projections that a compensation gave a bias that the architecture lacks."""
        return self.settings.get("added_bias", ())

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Query heads and KV heads of every block; (0, 0) where the attention is gone."""
        names = self.settings.get("heads") or ("num_attention_heads", "num_key_value_heads")
        layers = [self.config.per_layer_config[number] for number in range(len(self.widths))]
        query, keys = ([getattr(own, n, 0) if n else 0 for own in layers] for n in names)
        gone = self.without("attention")
        found = zip(query, keys, strict=True)
        return tuple((0, 0) if n in gone else (q, k or q) for n, (q, k) in enumerate(found))

    def without(self, kind: str) -> list[int]:
        """The blocks whose "attention" or FFN ("mlp") was taken out."""
        layers = (self.config.per_layer_config[number] for number in range(len(self.widths)))
        return [n for n, own in enumerate(layers) if kind in (getattr(own, "skip", None) or ())]

    @property
    def runs(self) -> str:
        """The runtime of the folder itself, for the error of a format that cannot hold it."""
        if self.family in NO_HEADS_PER_BLOCK and len(set(self.heads)) > 1:
            runtime = "transformers"
        elif self.family in NATIVE_FAMILIES:
            runtime = "vLLM with cfsp installed"
        elif self.without("attention"):
            runtime = "transformers"
        else:
            runtime = "vLLM's transformers backend"
        return f"the folder itself runs in {runtime}"

    @property
    def context(self) -> int:
        """Positions for full attention: where it slides, those of one window are the same."""
        positions = self.config.max_position_embeddings
        return min(positions, getattr(self.config, "sliding_window", None) or positions)

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """By the names of checkpoints; where these differ, the model is in memory whole."""
        model, tensors = self.opened.model, saved_tensors(self.opened.model)
        return converted(model, tensors) if isinstance(self.opened.blocks, LiveBlocks) else tensors

    def named_tensors(
        self, change_: Change = lambda block: None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in the order of :meth:`saved_tensors`, read from disk one block at a time,
        each then changed in place by ``change_``; a model in memory whole as it stands."""
        layout, blocks = self.opened.layout, self.opened.blocks
        tensors = self.saved_tensors().items()
        if isinstance(blocks, LiveBlocks):
            yield from tensors
            return
        for inside, part in groupby(tensors, lambda item: layout.place_of(item[0]) is not None):
            if not inside:
                yield from part
                continue
            with blocks.turns() as turns:
                for number, block in turns:
                    change_(block)
                    for name, tensor in block.state_dict().items():
                        yield layout.prefix(number) + name, tensor


def open_source(model: str | Path) -> ExportSource:
    """Open a model folder, hub id or GGUF file on the CPU, in the dtype that it is stored in."""
    config = load_config(model)
    if config.get_text_config() is not config:
        raise CfspError(
            f"cannot export {model}: {config.model_type!r} is multimodal, formats are not"
        )
    opened = open_any(model, device="cpu")
    return ExportSource(model, opened, opened.layout.intermediate_sizes(opened.model))


def check_family(source: ExportSource, families: Iterable[str], to: str, instead: str) -> None:
    """Raise CfspError unless the architecture is one that a format holds exactly."""
    if source.family not in families:
        known = ", ".join(families)
        raise CfspError(f"{to} holds {known} exactly, not {source.family!r}; {instead}")


def progress_bar(total: int, progress: bool) -> tqdm:
    """A bar of the bytes that are written."""
    return tqdm(total=total, desc="export", unit="B", unit_scale=True, disable=not progress)


def write_changed_weights(
    source: ExportSource, folder: Path, change_: Change, progress: bool
) -> None:
    """Write all tensors as safetensors, each block changed at its turn, and read them back; the
    source's skeleton has the changed shapes afterwards. RuntimeError, a defect, if a bit differs.
    """
    for block in source.opened.layout.find_blocks(source.opened.model):
        change_(block)
    planned = tensor_infos(source.saved_tensors())
    with progress_bar(sum(info.nbytes for info in planned.values()), progress) as bar:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in source.named_tensors(change_):
                yield name, tensor
                bar.update(tensor.nbytes)

        write_tensors(folder, planned, tensors())
    left = read_index(folder)
    for name, tensor in source.named_tensors(change_):
        if not torch.equal(read_tensors({name: left.pop(name)})[name], tensor):
            raise RuntimeError(f"{name} differs from the exported model's after reading it back")
    if left:
        raise RuntimeError(f"{', '.join(left)}: not of the exported model")
