"""``gguf``: one file for llama.cpp, with the tokenizer, written tensor by tensor.

llama.cpp's arch ``llama`` has one FFN width and number of heads for all blocks; ``deci``, the same
decoder, has them per block. Both rotate neighbouring pairs of q and k, so their rows are put in
that order. ``openelm`` is Qwen3 with sizes per block, its embeddings tied, q, k and v in one.
"""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import CfspError
from .gguf_tensors import GGUF_TYPES, STORED, GgufTensor, check_gguf_tensor, gguf_bytes
from .gguf_tokenizer import check_tokenizer, write_tokenizer
from .source import Details, ExportOptions, ExportSource, check_family, progress_bar

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "qwen3": ("qwen3", "openelm"),
}
"""Family -> llama.cpp's arch where blocks are alike, and the one that computes the same with widths
and heads per block."""
LLAMA_ARCHS = ("llama", "deci")
"""They rotate neighbouring pairs of q and k, not halves, and may have a bias on down_proj."""
ROPE_TYPES = ("default", "linear", "llama3")
"""Those that a factor per frequency says in full."""
ROPE_FACTORS = "rope_freqs.weight"
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""A setting of the generation config -> llama.cpp's name for it."""
PADDED_FIRST = "export it as padded first, and convert that folder"
NO_CHANNELS = 32
"""Zero channels in the place of an FFN that is gone: llama.cpp takes the attention for gone too if
there are none. As many as a block of Q8_0 holds."""


def architecture(source: ExportSource) -> str:
    """llama.cpp's arch for a model; CfspError where there is none."""
    alike, per_block = ARCHITECTURES[source.family]
    sizes = {*zip(source.widths, source.heads, strict=True)}
    if len(sizes) == 1 and (not source.added_bias or alike in LLAMA_ARCHS):
        return alike
    gone, why = source.without("attention"), None
    if per_block == "openelm":
        if source.added_bias:
            why = f"a bias on {source.added_bias[0].rpartition('.')[2]}"
        elif not source.config.tie_word_embeddings:
            why = "sizes per block and embeddings that are not tied"
        elif source.config.rope_parameters["rope_type"] != "default":
            why = "sizes per block and scaled RoPE"
        elif gone:
            why = f"no attention in block {gone[0]}"
    elif 0 in gone:
        why = "no attention in block 0"
    if why:
        raise CfspError(f"llama.cpp has no {source.family} with {why}; {instead(source)}")
    return per_block


def instead(source: ExportSource) -> str:
    """What to do with a model that no arch holds."""
    takes_out = source.without("attention") or source.without("mlp")
    return source.runs if takes_out else PADDED_FIRST


def check(source: ExportSource, options: ExportOptions) -> None:
    """Raise CfspError for what llama.cpp does not compute, or has no pre-tokenizer for."""
    if find_spec("gguf") is None:
        raise CfspError("the gguf export needs the package 'gguf': pip install 'cfsp[gguf]'")
    convert = f"{PADDED_FIRST} with llama.cpp's convert_hf_to_gguf.py"
    check_family(source, ARCHITECTURES, "gguf", convert)
    architecture(source)
    if source.config.hidden_act != "silu":
        raise CfspError(f"gguf holds models that compute silu, not {source.config.hidden_act!r}")
    if options.type is not None and options.type not in GGUF_TYPES:
        raise CfspError(f"unknown type {options.type!r}; valid: {', '.join(GGUF_TYPES)}")
    rope_type = source.config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise CfspError(f"gguf holds RoPE {', '.join(ROPE_TYPES)} exactly, not {rope_type!r}")
    check_tokenizer(source.opened.tokenizer, source.config.vocab_size, options.pre)


def write(source: ExportSource, options: ExportOptions, file: Path, progress: bool) -> Details:
    """Write one file. Details: ``architecture``, ``type``, ``pre`` of the tokenizer, and
    ``stored_as_f16``, the matrices whose rows have no whole number of Q8_0's blocks of 32."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

    arch = architecture(source)
    types = {dtype: name for name, dtype in STORED.items()}
    chosen = options.type or types[source.opened.model.dtype]
    planned = _planned(source, arch, chosen)
    writer = GGUFWriter(file, arch)
    try:
        write_parameters(writer, source, arch, chosen)
        pre = write_tokenizer(writer, source, options.pre)
        for entry in planned.values():
            # A dtype other than uint8: the shape is in values then, not in bytes.
            dtype, kind = np.dtype(np.float32), GGMLQuantizationType[entry.type]
            writer.add_tensor_info(entry.name, entry.shape, dtype, entry.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(sum(entry.nbytes for entry in planned.values()), progress) as bar:
            for name, values in _tensors(source, arch, source.named_tensors()):
                writer.write_tensor_data(gguf_bytes(planned[name], values))
                bar.update(planned[name].nbytes)
    finally:
        writer.close()
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    if list(found) != [entry.name for entry in planned.values()]:
        raise RuntimeError("the file holds other tensors than were written")
    for name, values in _tensors(source, arch, source.named_tensors()):
        check_gguf_tensor(planned[name], found[planned[name].name], values)
    as_f16 = [x.name for x in planned.values() if len(x.shape) > 1 and x.type != chosen]
    return {"architecture": arch, "type": chosen, "pre": pre, "stored_as_f16": as_f16}


def _planned(source: ExportSource, arch: str, chosen: str) -> dict[str, GgufTensor]:
    """The tensors to write, in their order, by the model's names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[arch.upper()], len(source.widths))
    planned = {}
    for name, tensor in _tensors(source, arch, source.saved_tensors().items()):
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name == ROPE_FACTORS:
            place = name
        if place is None:
            raise CfspError(f"llama.cpp's arch {arch} has no place for {name}")
        planned[name] = GgufTensor.planned(name, place, tuple(tensor.shape), chosen)
    return planned


def _tensors(
    source: ExportSource, arch: str, held: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors as an arch wants them, by the model's names; last its rotary factors."""
    layout, config, heads = source.opened.layout, source.config, source.heads
    joined: list[torch.Tensor] = []
    for name, values in held:
        number, projection = layout.number_of(name), name.split(".")[-2]
        query, keys = heads[number] if number is not None else (0, 0)
        if projection == "input_layernorm" and not query:
            continue  # of an attention that is gone
        if arch == "openelm" and projection in ("q_proj", "k_proj", "v_proj"):
            joined.append(values)
            if len(joined) < 3:
                continue
            name, values = name.replace("v_proj", "qkv_proj"), torch.cat(joined)
            joined.clear()
        elif arch in LLAMA_ARCHS and projection in ("q_proj", "k_proj"):
            values = neighbour_pairs(values, query if projection == "q_proj" else keys)
        yield name, values
    for number in source.without("mlp"):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            zeros = torch.zeros(NO_CHANNELS, config.hidden_size, dtype=source.opened.model.dtype)
            name = f"{layout.prefix(number)}mlp.{projection}.weight"
            yield name, zeros.T if projection == "down_proj" else zeros
    if config.rope_parameters["rope_type"] != "default":
        yield ROPE_FACTORS, rope_factors(source)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(source: ExportSource) -> torch.Tensor:
    """[head_dim / 2] fp32: by what llama.cpp divides each plain frequency."""
    config, rotary = source.config, source.opened.model.base_model.rotary_emb
    head_dim = _head_dim(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = 1 / config.rope_parameters["rope_theta"] ** exponents
    return (plain / rotary.inv_freq.double()).float()


def neighbour_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * head_dim, ...] of q or k, from halves of each head to neighbouring pairs."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def write_parameters(writer: Any, source: ExportSource, arch: str, chosen: str) -> None:
    """The model's shape and numbers, and how it generates."""
    config, per_block = source.config, arch in ("deci", "openelm")
    head_dim = _head_dim(config)
    writer.add_string("cfsp.format", "cfsp-gguf-1")  # by which it is known as ours
    writer.add_type("model")
    writer.add_name(source.opened.name)
    writer.add_file_type(GGUF_TYPES[chosen])
    if chosen == "Q8_0":
        writer.add_quantization_version(2)
    writer.add_block_count(len(source.widths))
    writer.add_context_length(source.context)
    writer.add_embedding_length(config.hidden_size)
    widths = [width or NO_CHANNELS for width in source.widths]
    heads, kv_heads = map(list, zip(*source.heads, strict=True))
    writer.add_feed_forward_length(widths if per_block else widths[0])
    writer.add_head_count(heads if per_block else heads[0])
    writer.add_head_count_kv(kv_heads if per_block else kv_heads[0])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    generation = source.opened.model.generation_config
    sampling = SAMPLING if getattr(generation, "do_sample", False) else {}
    for name, key in sampling.items():
        value = getattr(generation, name, None)
        if value is not None:
            getattr(writer, f"add_sampling_{key}")(value)
