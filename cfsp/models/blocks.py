"""Where the weights of a model's blocks are: in memory, or on disk until a block's turn comes."""

from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..io.block_reader import read_ahead
from ..io.safetensors import Readable, check_finite, first_values, read_tensors
from ..weights.sources import Source
from .fingerprints import SAMPLED_VALUES, model_fingerprint, samples_fingerprint
from .layouts import Layout
from .parts.channels import PartWeights
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

    def part_weights(self, number: int) -> tuple[PartWeights, ...]:
        """The matrices of every FFN of a block; no copy."""
        return self.layout.part_weights(self.layout.find_blocks(self.model)[number])

    def fingerprint(self) -> str:
        """The same for a model in memory and on disk: see :func:`model_fingerprint`."""
        return model_fingerprint(self.model, self.layout)


@dataclass(frozen=True)
class StoredBlocks:
    """The blocks of a skeleton: one has weights, during its turn, while the next is being read."""

    model: nn.Module
    """Parameters of blocks on meta; everything else in memory, on its device."""
    layout: Layout
    sources: Mapping[str, Source]
    """Of every parameter of every block by its name in the model."""
    device: torch.device

    def _sources(self, number: int, names: Iterable[str] | None = None) -> list[Source]:
        """What the parameters of a block are made of, of all or of these."""
        prefix = self.layout.prefix(number)
        if names is None:
            full = [name for name in self.sources if name.startswith(prefix)]
        else:
            full = [prefix + name for name in names]
        return list(dict.fromkeys(self.sources[name] for name in full))

    def _made(
        self, number: int, sources: Iterable[Source], read: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Parameters by their names in the block, on the device."""
        prefix = self.layout.prefix(number)
        return {
            name.removeprefix(prefix): tensor
            for source in sources
            for name, tensor in source.make(read, self.device).items()
        }

    @contextmanager
    def turns(
        self, wanted: Container[int] | None = None
    ) -> Iterator[Iterator[tuple[int, nn.Module]]]:
        """As of LiveBlocks; a block's weights go when the next ones come, which take their memory.
        Raises CfspError at the turn of a block whose shard cannot be read, or not finite."""
        blocks = _wanted(self.layout.find_blocks(self.model), wanted)
        sources = [self._sources(number) for number, _ in blocks]
        reads = [_reads(own) for own in sources]
        carries = not any(source.is_quantised for own in sources for source in own)

        def turns(
            read: Iterator[dict[str, torch.Tensor]],
        ) -> Generator[tuple[int, nn.Module], None, None]:
            for (number, block), own in zip(blocks, sources, strict=True):
                set_parameters_(block, self._checked(number, own, next(read)))
                try:
                    yield number, block
                finally:
                    empty_(block)

        with (
            read_ahead(reads, self.device, carries=carries) as read,
            closing(turns(read)) as found,
        ):
            yield found

    def _checked(
        self, number: int, sources: Iterable[Source], read: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        parameters = self._made(number, sources, read)
        check_finite(f"the weights of block {number}", parameters)
        return parameters

    def stored_bytes(self, number: int) -> int:
        """Bytes that a block's turn reads from disk."""
        return sum(x.nbytes for source in self._sources(number) for x in source.stored)

    def part_weights(self, number: int) -> tuple[PartWeights, ...]:
        """The matrices of every FFN of a block, read from disk."""
        block = self.layout.find_blocks(self.model)[number]
        sources = self._sources(number, self.layout.weight_names(block))
        values = read_tensors(_reads(sources))
        return self.layout.part_weights(block, self._made(number, sources, values))

    def fingerprint(self) -> str:
        """See :func:`model_fingerprint`: a few values of each matrix are read."""
        return model_fingerprint(self.model, self.layout, self.sources)

    def checkpoint_fingerprint(self) -> str:
        """Identifies the stored blocks by every tensor's shape and first values."""
        return samples_fingerprint(
            (f"{name} {number}", part.shape, first_values(part, SAMPLED_VALUES).float())
            for name, source in sorted(self.sources.items())
            for number, part in enumerate(source.stored)
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


def _reads(sources: Iterable[Source]) -> dict[str, Readable]:
    return {key: stored for source in sources for key, stored in source.reads.items()}
