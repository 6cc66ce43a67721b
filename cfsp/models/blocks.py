"""Where the weights of a model's blocks are: in memory, or on disk until a block's turn comes."""

from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..io.block_reader import read_ahead
from ..io.safetensors import StoredTensor, check_finite, first_values, read_tensors
from .ffns.channels import FFNWeights
from .fingerprints import SAMPLED_VALUES, model_fingerprint, samples_fingerprint
from .layouts import Layout
from .surgery import empty_, set_parameters_


@dataclass(frozen=True)
class LiveBlocks:
    """The blocks of a model that is in memory whole."""

    model: nn.Module
    layout: Layout

    @contextmanager
    def turns(
        self, wanted: Container[int] | None = None
    ) -> Iterator[Iterator[tuple[int, nn.Module]]]:
        """(number, block) of every wanted block in order; None: of all. Raises CfspError at the
        turn of a block whose weights are not finite."""
        yield _finite(_wanted(self.layout.find_blocks(self.model), wanted))

    def stored_bytes(self, number: int) -> int:
        """Bytes that a block's turn reads from disk."""
        return 0

    def ffn_weights(self, number: int) -> tuple[FFNWeights, ...]:
        """The matrices of every FFN of a block; no copy."""
        return self.layout.ffn_weights(self.layout.find_blocks(self.model)[number])

    def fingerprint(self) -> str:
        """The same for a model in memory and on disk: see :func:`model_fingerprint`."""
        return model_fingerprint(self.model, self.layout)


@dataclass(frozen=True)
class StoredBlocks:
    """The blocks of a skeleton: one has weights, during its turn, while the next is being read."""

    model: nn.Module
    """Parameters of blocks on meta; everything else in memory, on its device."""
    layout: Layout
    tensors: Mapping[str, StoredTensor]
    """Every parameter of every block by its name in the model."""
    dtype: torch.dtype
    device: torch.device

    def _stored(self, number: int) -> dict[str, StoredTensor]:
        """A block's tensors by their names in the block."""
        prefix = self.layout.prefix(number)
        return {
            name.removeprefix(prefix): stored
            for name, stored in self.tensors.items()
            if name.startswith(prefix)
        }

    @contextmanager
    def turns(
        self, wanted: Container[int] | None = None
    ) -> Iterator[Iterator[tuple[int, nn.Module]]]:
        """As of LiveBlocks; a block's weights go when the next ones come, which take their memory.
        Raises CfspError at the turn of a block whose shard cannot be read, or not finite."""
        blocks = _wanted(self.layout.find_blocks(self.model), wanted)
        stored = [self._stored(number) for number, _ in blocks]
        with (
            read_ahead(stored, self.dtype, self.device) as weights,
            closing(_turns(blocks, weights)) as turns,
        ):
            yield turns

    def stored_bytes(self, number: int) -> int:
        """Bytes that a block's turn reads from disk."""
        return sum(stored.nbytes for stored in self._stored(number).values())

    def ffn_weights(self, number: int) -> tuple[FFNWeights, ...]:
        """The matrices of every FFN of a block, read from disk."""
        block, stored = self.layout.find_blocks(self.model)[number], self._stored(number)
        values = read_tensors({name: stored[name] for name in self.layout.weight_names(block)})
        placed = {name: value.to(self.dtype).to(self.device) for name, value in values.items()}
        return self.layout.ffn_weights(block, placed)

    def fingerprint(self) -> str:
        """See :func:`model_fingerprint`: a few values of each matrix are read."""
        return model_fingerprint(self.model, self.layout, self.tensors, self.dtype)

    def checkpoint_fingerprint(self) -> str:
        """Identifies the stored blocks by every tensor's name, shape and first values."""
        return samples_fingerprint(
            (name, stored.shape, first_values(stored, SAMPLED_VALUES).float())
            for name, stored in sorted(self.tensors.items())
        )


Blocks = LiveBlocks | StoredBlocks


def _wanted(
    blocks: Sequence[nn.Module], wanted: Container[int] | None
) -> list[tuple[int, nn.Module]]:
    return [(n, block) for n, block in enumerate(blocks) if wanted is None or n in wanted]


def _finite(blocks: Sequence[tuple[int, nn.Module]]) -> Iterator[tuple[int, nn.Module]]:
    for number, block in blocks:
        check_finite(f"the weights of block {number}", dict(block.named_parameters()))
        yield number, block


def _turns(
    blocks: Sequence[tuple[int, nn.Module]], weights: Iterator[dict[str, torch.Tensor]]
) -> Generator[tuple[int, nn.Module], None, None]:
    for number, block in blocks:
        parameters = next(weights)
        check_finite(f"the weights of block {number}", parameters)
        set_parameters_(block, parameters)
        del parameters  # no name keeps them, so that they go with the turn
        try:
            yield number, block
        finally:
            empty_(block)
