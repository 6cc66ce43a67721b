"""Write a checkpoint of real shapes with random weights, tensor by tensor, at the disk's speed.

``python -m benchmarks.jobs.synthetic --model llama-3-8b --out DIR [--blocks N] [--dtype bfloat16]``

Memory: one tensor and a pool of random values, whatever the model's size. The values are a pool of
normal ones, read from another place for each tensor: the same bytes in each run, no two rows alike.
"""

import argparse
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cfsp.io.safetensors import TensorInfo
from cfsp.io.shard_writer import ShardWriter, pack_shards, write_index
from cfsp.models.tensors import saved_tensors, tensor_infos
from cfsp.weights.mapping import converted

POOL_VALUES = 16_777_259  # a prime: rows of any width start at another place in it
DEVIATION = 0.02  # what transformers initialises a Llama with
SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Model:
    """A Llama's shapes, and what to calibrate it on."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    key_value_heads: int
    vocabulary: int
    samples: int
    seqlen: int


MODELS = {
    "tiny": Model(64, 256, 2, 4, 2, 512, 4, 64),
    "llama-2-7b": Model(4096, 11008, 32, 32, 32, 32000, 128, 1024),
    "llama-3-8b": Model(4096, 14336, 32, 32, 8, 128256, 128, 1024),
    "llama-3-70b": Model(8192, 28672, 80, 64, 8, 128256, 128, 1024),
}


def llama_config(model: Model) -> Any:
    """The transformers config of these shapes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.blocks,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_value_heads,
        vocab_size=model.vocabulary,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
    )


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes: enough to turn any text into ids of a random model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i + 2 for i, character in enumerate(alphabet)}
    vocabulary |= {"<s>": 0, "</s>": 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_text(path: Path, characters: int) -> None:
    """Random words, the same in each run."""
    words = random.Random(0)
    letters = "etaoinshrdlu"
    pieces: list[str] = []
    length = 0
    while length < characters:
        pieces.append("".join(words.choices(letters, k=words.randint(2, 9))))
        length += len(pieces[-1]) + 1
    path.write_text(" ".join(pieces), "utf-8")


def _values(name: str, info: TensorInfo, pool: torch.Tensor, place: int) -> torch.Tensor:
    """Ones for norms, else values of the pool from ``place`` on."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    if name.endswith("norm.weight"):
        return tensor.fill_(1)
    flat, done = tensor.view(-1), 0
    while done < len(flat):
        part = pool[(place + done) % POOL_VALUES :][: len(flat) - done]
        flat[done : done + len(part)] = part
        done += len(part)
    return tensor


def write_checkpoint(folder: Path, config: Any, dtype: torch.dtype) -> None:
    """The config, tokenizer and random weights of a model, in shards.

    Args:
        folder: filled; made where it is absent.
        config: of a causal LM of transformers; tensors have the names that it has on the hub.
        dtype: of the weights.
    """
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    infos = tensor_infos(converted(model, saved_tensors(model)))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    write_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(POOL_VALUES).normal_(0, DEVIATION, generator=generator).to(dtype)
    shards = pack_shards(infos, SHARD_BYTES)
    with ShardWriter(folder, shards) as writer:
        for number, (name, info) in enumerate(infos.items()):
            writer.write(name, _values(name, info, pool, number * 7919))
    write_index(folder, shards)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.synthetic", description=(__doc__ or "").split("\n")[0]
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", choices=sorted(MODELS))
    source.add_argument("--config", type=Path, help="a config.json of transformers")
    parser.add_argument("--blocks", type=int, help="fewer or more blocks than the model has")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty")
    if options.model:
        config = llama_config(MODELS[options.model])
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(options.config)
    if options.blocks:
        config.num_hidden_layers = options.blocks
    write_checkpoint(options.out, config, getattr(torch, options.dtype))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
