"""Where the weights of a model's blocks are: in memory, or on disk until a block's turn comes."""

from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..io.block_reader import BlockReader
from ..io.shards import StoredTensor, first_values, read_tensors
from .channels import FFNWeights
from .fingerprints import SAMPLED_VALUES, model_fingerprint, samples_fingerprint
from .layouts import Layout


@dataclass(frozen=True)
class LiveBlocks:
    """The blocks of a model that is in memory whole."""

    model: nn.Module
    layout: Layout

    @contextmanager
    def turns(
        self, wanted: Container[int] | None = None
    ) -> Iterator[Iterator[tuple[int, nn.Module]]]:
        """(number, block) of every wanted block in order; None: of all."""
        yield iter(_wanted(self.layout.find_blocks(self.model), wanted))

    def stored_bytes(self, number: int) -> int:
        """Bytes that a block's turn reads from disk."""
        return 0

    def ffn_weights(self, number: int) -> tuple[FFNWeights, ...]:
        """The matrices of every FFN of a block; no copy."""
        return self.layout.ffn_weights(self.layout.find_blocks(self.model)[number])

    def fingerprint(self) -> str:
        """See :func:`cfsp.models.fingerprints.model_fingerprint`."""
        return model_fingerprint(self.model, self.layout)


@dataclass(frozen=True)
class StoredBlocks:
    """The blocks of a skeleton, without weights but for the one whose turn it is.

    The next block is read while one has its turn: two are in memory at a time.
    """

    model: nn.Module
    """Parameters of blocks on meta; everything else in memory, on its device."""
    layout: Layout
    tensors: Mapping[str, StoredTensor]
    """Every parameter of every block by its name in the model."""
    dtype: torch.dtype
    device: torch.device

    def _stored(self, number: int) -> dict[str, StoredTensor]:
        """A block's tensors by their names in the block."""
        prefix = f"{self.layout.blocks}.{number}."
        return {
            name.removeprefix(prefix): stored
            for name, stored in self.tensors.items()
            if name.startswith(prefix)
        }

    @contextmanager
    def turns(
        self, wanted: Container[int] | None = None
    ) -> Iterator[Iterator[tuple[int, nn.Module]]]:
        """(number, block with its weights) of every wanted block in order; they go when the next
        comes, whose weights take their memory. None: of all; others are not read.

        Raises, at a block's turn:
            CfspError: its shard cannot be read.
        """
        blocks = _wanted(self.layout.find_blocks(self.model), wanted)
        stored = [self._stored(number) for number, _ in blocks]
        with BlockReader(stored, self.dtype, self.device) as reader:
            turns = _turns(blocks, reader)
            try:
                yield turns
            finally:
                turns.close()

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype).to(self.device)

    def stored_bytes(self, number: int) -> int:
        """Bytes that a block's turn reads from disk."""
        prefix = f"{self.layout.blocks}.{number}."
        return sum(x.nbytes for name, x in self.tensors.items() if name.startswith(prefix))

    def ffn_weights(self, number: int) -> tuple[FFNWeights, ...]:
        """The matrices of every FFN of a block, read from disk."""
        block = self.layout.find_blocks(self.model)[number]
        prefix = f"{self.layout.blocks}.{number}."
        stored = {n: self.tensors[prefix + n] for n in self.layout.weight_names(block)}
        values = {name: self._placed(tensor) for name, tensor in read_tensors(stored).items()}
        return self.layout.ffn_weights(block, values)

    def fingerprint(self) -> str:
        """That of the model in memory, from a few values of each matrix."""

        def samples() -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
            for number, block in enumerate(self.layout.find_blocks(self.model)):
                for name in self.layout.weight_names(block):
                    stored = self.tensors[f"{self.layout.blocks}.{number}.{name}"]
                    values = first_values(stored, SAMPLED_VALUES).to(self.dtype)
                    yield f"{number}.{name}", stored.shape, values

        return samples_fingerprint(samples())

    def checkpoint_fingerprint(self) -> str:
        """Identifies the stored blocks by every tensor's name, shape and first values."""
        return samples_fingerprint(
            (name, stored.shape, first_values(stored, SAMPLED_VALUES).float())
            for name, stored in sorted(self.tensors.items())
        )


def _turns(
    blocks: Sequence[tuple[int, nn.Module]], reader: BlockReader
) -> Generator[tuple[int, nn.Module], None, None]:
    for position, (number, block) in enumerate(blocks):
        set_parameters_(block, reader.weights(position))
        try:
            yield number, block
        finally:
            empty_(block)
            reader.release(position)


Blocks = LiveBlocks | StoredBlocks


def _wanted(
    blocks: Sequence[nn.Module], wanted: Container[int] | None
) -> list[tuple[int, nn.Module]]:
    return [(n, block) for n, block in enumerate(blocks) if wanted is None or n in wanted]


def set_parameters_(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a module these parameters, as they are, without a copy."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


def empty_(module: nn.Module) -> None:
    """Drop the values of a module's parameters; their shapes stay, on meta."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device="meta")
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
