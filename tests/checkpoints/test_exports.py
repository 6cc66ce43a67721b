"""Exports: what they say is what the pruned model says, and what they cannot hold is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import cfsp
from cfsp.checkpoints.exports import gguf_model, padded
from cfsp.checkpoints.exports.gguf_tokenizer import merge_scores, pre_tokenizer_name, vocabulary
from cfsp.cli.main import main
from cfsp.errors import CfspError
from cfsp.io.shard_writer import ShardWriter
from cfsp.models import opening as streaming

from ..conftest import FAMILIES, TEXT, make_tiny

gguf = pytest.importorskip("gguf")

CHANNELS, VOCABULARY = 64, 420
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make_bpe(steps: list[pre_tokenizers.PreTokenizer], **options: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on this file; BOS 0, EOS 1."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token=None
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def by_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, compensation, config values) -> a folder with other widths in every block."""
    made: dict[str, Path] = {}
    tokenizer = make_bpe([by_words()])

    def prune(family: str = "llama", compensation: str = "none", **values: object) -> Path:
        key = f"{family}-{compensation}-{sorted(values.items())}"
        if key not in made:
            shape = {"vocab_size": VOCABULARY, "intermediate_size": CHANNELS, "head_dim": 16}
            ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
            model = make_tiny(family, **{**shape, **ids, **values})
            model.generation_config.max_new_tokens = 7
            made[key] = tmp_path_factory.mktemp("pruned") / family
            recipe = cfsp.Recipe(
                scorer="cfsp",
                sparsity=0.3,
                width_multiple=1,
                compensation=compensation,
                calibration=cfsp.Calibration(dataset=TEXT, samples=2, seqlen=32),
            )
            cfsp.prune(model, tokenizer, recipe, made[key], eval_windows=0, progress=False)
        return made[key]

    return prune


def family_tokenizer(family: str = "llama") -> PreTrainedTokenizerFast:
    """One that splits text as the family's do: transformers knows that of Qwen2 by heart."""
    steps = split(WORDS + r"\p{N}" + REST) if family == "qwen2" else [by_words()]
    return make_bpe(steps)


def dense(folder: Path, family: str = "llama", **values: object) -> Path:
    """A folder of a stock architecture with one width."""
    shape = {"vocab_size": VOCABULARY, "intermediate_size": CHANNELS, "head_dim": 16}
    make_tiny(family, **{**shape, **values}).save_pretrained(folder)
    family_tokenizer(family).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """[1, 24, V] for fixed tokens, other than those of the package's own probe."""
    return model(torch.arange(24)[None] * 17 % VOCABULARY).logits


def export(source: Path, to: str, out: Path, **options: object) -> cfsp.ExportResult:
    return cfsp.export(source, to, out, progress=False, **options)  # type: ignore[arg-type]


def read_gguf(file: Path) -> tuple[dict[str, object], dict[str, object]]:
    """(values by key, tensors by name) of a GGUF file."""
    reader = gguf.GGUFReader(file)
    values = {key: field.contents() for key, field in reader.fields.items()}
    return values, {tensor.name: tensor for tensor in reader.tensors}


def assert_nothing_written(out: Path) -> None:
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_is_the_stock_class_and_says_the_same(
    pruned: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    source, out = pruned(family), tmp_path / "padded"
    result = export(source, "padded", out, multiple=32)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not type(model).__module__.startswith("cfsp")
    assert model.config.model_type == family
    assert model.config.intermediate_size == result.details["width"] == CHANNELS
    assert model.model.layers[1].mlp.down_proj.weight.shape[1] == CHANNELS
    assert model.config.cfsp_config["padded_from"] == list(result.widths)
    expected = logits(cfsp.load(source))
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


OTHER_FAMILIES: dict[str, dict[str, object]] = {
    "phi3": {"pad_token_id": 1},
    "glm4": {"pad_token_id": 1},
    "starcoder2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": CHANNELS, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": CHANNELS},
}
"""Fused, ungated and Conv1D FFNs, and a family whose checkpoints have names of their own."""


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_padded_holds_ffns_of_every_kind(
    pruned: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    source = pruned(family, head_dim=8, **OTHER_FAMILIES[family])
    result = export(source, "padded", tmp_path / "padded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert model.config.model_type == family
    assert len(set(result.widths)) > 1
    torch.testing.assert_close(logits(model), logits(cfsp.load(source)), rtol=1e-4, atol=1e-4)


def test_padded_refuses_what_the_stock_class_cannot_be(tmp_path: Path) -> None:
    for family, values, message in (
        ("mixtral", {"num_local_experts": 4}, "padded holds plain FFNs, not the experts of mixt"),
        ("bloom", {}, "the FFN width of bloom follows from its hidden size"),
    ):
        source = dense(tmp_path / family, family, **values)
        with pytest.raises(CfspError, match=message):
            export(source, "padded", tmp_path / "padded")
        assert_nothing_written(tmp_path / "padded")


def test_padded_goes_up_to_the_widest_block_or_a_multiple(
    pruned: Callable[..., Path], tmp_path: Path
) -> None:
    source = pruned()
    widest = max(export(source, "padded", tmp_path / "a").widths)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["intermediate_size"] == widest
    assert export(source, "padded", tmp_path / "b", multiple=48).details["width"] == 96
    with pytest.raises(CfspError, match="multiple is 0, expected 1 or more"):
        export(source, "padded", tmp_path / "c", multiple=0)


def test_generation_config_and_chat_template_come_along(
    pruned: Callable[..., Path], tmp_path: Path
) -> None:
    for to in ("padded", "nemotron-nas"):
        export(pruned(), to, tmp_path / to)
        generation = json.loads((tmp_path / to / "generation_config.json").read_text())
        assert generation["max_new_tokens"] == 7
        text = AutoTokenizer.from_pretrained(tmp_path / to).apply_chat_template(
            [{"role": "user", "content": "hello"}], tokenize=False
        )
        assert text == "hello"


def test_an_added_bias_is_held_by_llama_and_refused_by_others(
    pruned: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = pruned("llama", "bias"), tmp_path / "padded"
    export(source, "padded", out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.mlp_bias
    assert model.model.layers[0].mlp.down_proj.bias.abs().max() > 0
    torch.testing.assert_close(logits(model), logits(cfsp.load(source)), rtol=1e-4, atol=1e-5)
    with pytest.raises(CfspError, match="mistral has no place for the bias"):
        export(pruned("mistral", "bias"), "padded", tmp_path / "mistral")
    assert_nothing_written(tmp_path / "mistral")


def test_a_padded_model_that_says_something_else_is_not_kept(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow = padded.zero_padded
    monkeypatch.setattr(padded, "zero_padded", lambda *arguments: grow(*arguments) + 0.1)
    with pytest.raises(RuntimeError, match="the padded model differs from the pruned one by"):
        export(pruned(), "padded", tmp_path / "out")
    assert_nothing_written(tmp_path / "out")


@pytest.mark.parametrize("to", ["padded", "nemotron-nas"])
def test_weights_that_were_written_wrong_are_not_kept(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    source, write = pruned(), ShardWriter.write

    def write_wrongly(writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        write(writer, name, tensor.nextafter(tensor + 1) if "3.mlp.down" in name else tensor)

    monkeypatch.setattr(ShardWriter, "write", write_wrongly)
    with pytest.raises(RuntimeError, match=r"layers.3.mlp.down_proj.weight differs"):
        export(source, to, tmp_path / "out")
    assert_nothing_written(tmp_path / "out")


def test_nemotron_nas_has_the_same_weights_and_an_exact_width_per_block(
    pruned: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = pruned("mistral", sliding_window=40), tmp_path / "nas"
    result = export(source, "nemotron-nas", out)
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert [block.ffn.intermediate_size for block in config.block_configs] == list(result.widths)
    assert not any(hasattr(block.ffn, "ffn_mult") for block in config.block_configs)
    assert config.block_configs[0].attention.n_heads_in_group == 2
    assert config.max_position_embeddings == 40  # where attention begins to slide
    assert config.architectures == ["DeciLMForCausalLM"]
    assert len(set(result.widths)) > 1


def test_ffn_mult_is_written_where_every_width_allows_it(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense", intermediate_size=256, hidden_size=48)
    assert export(source, "nemotron-nas", tmp_path / "nas").details == {"ffn_mult": True}
    block = json.loads((tmp_path / "nas" / "config.json").read_text())["block_configs"][0]["ffn"]
    width = int(2 * block["ffn_mult"] * 48 / 3)
    assert math.ceil(width / 256) * 256 == block["intermediate_size"] == 256


def test_nemotron_nas_has_zero_biases_beside_the_added_one(
    pruned: Callable[..., Path], tmp_path: Path
) -> None:
    export(pruned("llama", "bias"), "nemotron-nas", tmp_path / "nas")
    tensors = load_file(tmp_path / "nas" / "model.safetensors")
    assert json.loads((tmp_path / "nas" / "config.json").read_text())["mlp_bias"] is True
    assert tensors["model.layers.2.mlp.up_proj.bias"].count_nonzero() == 0
    assert tensors["model.layers.2.mlp.down_proj.bias"].count_nonzero() > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_gguf_of_one_width_is_what_transformers_reads(tmp_path: Path, family: str) -> None:
    source = dense(tmp_path / "dense", family, hidden_size=64)
    out = tmp_path / "model.gguf"
    result = export(source, "gguf", out)
    opened = cfsp.open_model(out)
    assert result.details["type"] == "F32"
    assert torch.equal(logits(opened.model), logits(cfsp.load(source)))
    text = "It's 1234 words,\n\n  isn't it? Grüße"
    assert opened.tokenizer(text).input_ids == family_tokenizer(family)(text).input_ids


def test_a_gguf_file_is_exported_too(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense", hidden_size=64)
    export(source, "gguf", tmp_path / "first.gguf")
    export(tmp_path / "first.gguf", "padded", tmp_path / "padded", multiple=100)
    export(tmp_path / "padded", "gguf", tmp_path / "second.gguf")
    again = cfsp.open_model(tmp_path / "second.gguf")
    assert again.layout.intermediate_sizes(again.model) == (100,) * 4
    torch.testing.assert_close(logits(again.model), logits(cfsp.load(source)))
    export(tmp_path / "first.gguf", "gguf", tmp_path / "third.gguf")
    assert torch.equal(
        logits(cfsp.open_model(tmp_path / "third.gguf").model), logits(cfsp.load(source))
    )


def test_gguf_holds_a_width_per_block(pruned: Callable[..., Path], tmp_path: Path) -> None:
    source, out = pruned("llama", "bias"), tmp_path / "model.gguf"
    result = export(source, "gguf", out)
    values, tensors = read_gguf(out)
    assert values["general.architecture"] == "deci"
    assert values["deci.feed_forward_length"] == list(result.widths)
    assert values["deci.attention.head_count_kv"] == [2] * 4
    weights = load_file(source / "model.safetensors")
    for number in range(4):
        down = torch.tensor(tensors[f"blk.{number}.ffn_down.weight"].data)
        assert torch.equal(down, weights[f"model.layers.{number}.mlp.down_proj.weight"])
        bias = torch.tensor(tensors[f"blk.{number}.ffn_down.bias"].data)
        assert torch.equal(bias, weights[f"model.layers.{number}.mlp.down_proj.bias"])


def test_gguf_puts_the_halves_of_each_head_side_by_side(
    pruned: Callable[..., Path], tmp_path: Path
) -> None:
    export(pruned(), "gguf", tmp_path / "model.gguf")
    _, tensors = read_gguf(tmp_path / "model.gguf")
    stored = torch.tensor(tensors["blk.1.attn_k.weight"].data)
    source = load_file(pruned() / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    for head in range(2):
        for pair in range(8):
            row = head * 16 + 2 * pair
            assert torch.equal(stored[row], source[head * 16 + pair])
            assert torch.equal(stored[row + 1], source[head * 16 + pair + 8])


def test_gguf_divides_frequencies_as_llama3_scales_them(
    pruned: Callable[..., Path], tmp_path: Path
) -> None:
    export(pruned(rope_parameters=LLAMA3_ROPE), "gguf", tmp_path / "model.gguf")
    factors = read_gguf(tmp_path / "model.gguf")[1]["rope_freqs.weight"].data.tolist()
    expected = []
    for index in range(8):
        wavelength = 2 * math.pi * 10000 ** (2 * index / 16)
        smooth = (32 / wavelength - 1) / 3
        between = 1 / ((1 - smooth) / 8 + smooth)
        expected.append(1 if wavelength < 8 else 8 if wavelength > 32 else between)
    assert factors == pytest.approx(expected, rel=1e-5)
    assert 1 < factors[1] < 8
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
    source = dense(tmp_path / "yarn", rope_parameters=yarn)
    with pytest.raises(CfspError, match="gguf holds RoPE default, linear, llama3 exactly"):
        export(source, "gguf", tmp_path / "yarn.gguf")


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [("F16", torch.float16, 2**-11), ("BF16", torch.bfloat16, 2**-8), ("Q8_0", None, 0.005)],
)
def test_gguf_types_are_as_precise_as_they_can_be(
    pruned: Callable[..., Path], tmp_path: Path, kind: str, dtype: torch.dtype | None, bound: float
) -> None:
    result = export(pruned(), "gguf", tmp_path / "model.gguf", type=kind)
    _, tensors = read_gguf(tmp_path / "model.gguf")
    source = load_file(pruned() / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    up = tensors["blk.0.ffn_up.weight"]
    assert up.tensor_type.name == kind
    found = torch.tensor(gguf.quants.dequantize(up.data, up.tensor_type))
    if dtype is not None:
        assert torch.equal(found, source.to(dtype).float())
    assert 0 < (found - source).abs().max() <= bound * source.abs().max()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    uneven = [f"blk.{n}.ffn_down.weight" for n, width in enumerate(result.widths) if width % 32]
    assert result.details["stored_as_f16"] == (uneven if kind == "Q8_0" else [])
    assert uneven


def test_gguf_refuses_values_that_f16_cannot_hold(tmp_path: Path) -> None:
    model = make_tiny(vocab_size=VOCABULARY)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "large")
    make_bpe([by_words()]).save_pretrained(tmp_path / "large")
    with pytest.raises(CfspError, match=r"layers.1.mlp.up_proj.weight has values above 65504"):
        export(tmp_path / "large", "gguf", tmp_path / "model.gguf", type="F16")
    assert_nothing_written(tmp_path / "model.gguf")
    export(tmp_path / "large", "gguf", tmp_path / "model.gguf", type="BF16")


def test_a_gguf_file_that_differs_is_not_kept(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = gguf_model.gguf_bytes

    def flip(tensor: object, values: torch.Tensor) -> object:
        data = encode(tensor, values)  # type: ignore[arg-type]
        if tensor.name == "blk.3.ffn_gate.weight":  # type: ignore[attr-defined]
            data[-2] ^= 1  # above the last bits that a type may round away
        return data

    monkeypatch.setattr(gguf_model, "gguf_bytes", flip)
    with pytest.raises(RuntimeError, match=r"blk.3.ffn_gate.weight differs"):
        export(pruned(), "gguf", tmp_path / "model.gguf")
    assert_nothing_written(tmp_path / "model.gguf")


def test_gguf_carries_special_tokens_template_and_sampling(tmp_path: Path) -> None:
    model = make_tiny(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9)
    model.generation_config.eos_token_id = [1, 5]
    model.save_pretrained(tmp_path / "dense")
    make_bpe([by_words()]).save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", "gguf", tmp_path / "model.gguf")
    values, _ = read_gguf(tmp_path / "model.gguf")
    prefix = "tokenizer.ggml"
    assert values[f"{prefix}.bos_token_id"] == 0
    assert (values[f"{prefix}.eos_token_id"], values[f"{prefix}.eot_token_id"]) == (1, 5)
    assert values[f"{prefix}.add_bos_token"] is True
    assert values[f"{prefix}.add_eos_token"] is False
    assert values["tokenizer.chat_template"].startswith("{% for message")
    assert values[f"{prefix}.token_type"][:3] == [3, 3, 1]
    assert values[f"{prefix}.tokens"][-1] == f"[PAD{VOCABULARY - 1}]"
    assert values["general.sampling.temp"] == pytest.approx(0.7)
    assert values["general.sampling.top_p"] == pytest.approx(0.9)


def test_pre_tokenizers_are_told_apart_by_their_steps() -> None:
    def name(steps: list[pre_tokenizers.PreTokenizer], **options: bool) -> str:
        return pre_tokenizer_name(json.loads(make_bpe(steps, **options)._tokenizer.to_str()))

    digits = pre_tokenizers.Digits(individual_digits=True)
    assert name([by_words()]) == "gpt-2"
    assert name([digits, by_words()]) == "smollm"
    assert name(split(WORDS + r"\p{N}{1,3}" + REST), ignore_merges=True) == "llama-bpe"
    assert name(split(WORDS + r"\p{N}" + REST)) == "qwen2"
    for unknown in ([pre_tokenizers.ByteLevel()], [digits, by_words(), digits]):
        with pytest.raises(CfspError, match="`pre=NAME` says which"):
            name(unknown)
    with pytest.raises(CfspError, match=r"none of llama\.cpp's pre-tokenizers"):
        name(split(WORDS + r"\p{N}{1,3}" + REST))  # its words go through the merges


def test_a_sentencepiece_like_vocabulary_has_scores_in_the_order_of_merges() -> None:
    tokens = ["<unk>", "</s>", "<0x0A>", "a", "b", "ab", "ba", "abba"]
    backend = {
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {token: number for number, token in enumerate(tokens)},
        },
        "added_tokens": [
            {"id": 1, "content": "</s>", "special": True},
            {"id": 9, "content": "<no embedding>", "special": True},
        ],
    }
    assert pre_tokenizer_name(backend) == "default"
    assert vocabulary(backend, 9) == ([*tokens, "[PAD8]"], [2, 3, 6, 1, 1, 1, 1, 1, 5])
    scores = merge_scores(tokens, [("b", "a"), ("a", "b"), ("ab", "ba"), ("abb", "a")])
    assert scores[5:] == [-1, 0, -2]
    assert max(scores[:5]) < min(scores[5:])


def test_what_llama_cpp_cannot_run_is_refused_before_any_work(
    pruned: Callable[..., Path], tmp_path: Path, tiny_folder: Path
) -> None:
    out = tmp_path / "model.gguf"
    for source, options, message in (
        (pruned("gemma"), {}, "gguf holds llama, mistral, qwen2, qwen3 exactly, not 'gemma'"),
        (
            pruned("qwen3"),
            {},
            "has no qwen3 with sizes per block and embeddings that are not tied; ex",
        ),
        (pruned(), {"type": "Q4_K"}, "unknown type 'Q4_K'; valid: F32, F16, BF16, Q8_0"),
        (tiny_folder, {}, "llama.cpp reads no BPE tokenizer without merges"),
    ):
        with pytest.raises(CfspError, match=message):
            export(source, "gguf", out, **options)
        assert_nothing_written(out)
    with pytest.raises(CfspError, match="nemotron-nas holds llama, mistral exactly, not 'qwen2'"):
        export(pruned("qwen2"), "nemotron-nas", tmp_path / "nas")
    assert_nothing_written(tmp_path / "nas")


def test_a_padded_qwen3_goes_on_to_gguf(pruned: Callable[..., Path], tmp_path: Path) -> None:
    export(pruned("qwen3"), "padded", tmp_path / "padded")
    assert export(tmp_path / "padded", "gguf", tmp_path / "m.gguf").details["architecture"] == (
        "qwen3"
    )


def test_no_export_loads_a_model_whole(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block at a time: the way that reads all weights is not taken, to write or to verify."""

    def whole(*_: object, **__: object) -> None:
        raise AssertionError("loaded whole")

    source = pruned()

    monkeypatch.setattr(streaming, "open_model", whole)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", whole)
    for to, name in (("padded", "padded"), ("nemotron-nas", "nas"), ("gguf", "model.gguf")):
        export(source, to, tmp_path / name)
        assert (tmp_path / name).exists()


def test_a_full_disk_leaves_nothing(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    for to, out in (("padded", tmp_path / "padded"), ("gguf", tmp_path / "model.gguf")):
        with pytest.raises(CfspError, match="No space left"):
            export(pruned(), to, out)
        assert_nothing_written(out)


def test_command_line(
    pruned: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["export", str(pruned()), "--quiet", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    out = tmp_path / "model.gguf"
    code, printed, _ = run("--to", "gguf", "--out", out, "--type", "bf16", "--json")
    result = json.loads(printed.splitlines()[-1])
    assert code == 0
    assert (result["architecture"], result["type"], result["pre"]) == ("deci", "BF16", "gpt-2")
    assert result["bytes"] == out.stat().st_size
    for arguments, message in (
        (("--to", "gguf", "--out", out), f"output {out} exists; --overwrite replaces it"),
        (("--to", "onnx", "--out", out), "unknown format 'onnx'; valid: nemotron-nas, gguf, pad"),
        (("--to", "gguf", "--out", tmp_path / "model"), "its name ends in .gguf"),
        (("--to", "padded", "--out", tmp_path, "--type", "F16"), "type is an option of gguf, not"),
        (("--to", "padded", "--out", pruned(), "--overwrite"), "is the input"),
    ):
        code, printed, error = run(*arguments)
        assert (code, printed) == (2, "")
        assert message in error
        assert error.count("\n") == 1
    code, printed, _ = run("--to", "gguf", "--out", out, "--overwrite", "--pre", "smollm")
    assert code == 0
    assert f"written, read back and compared: {out}" in printed
    assert read_gguf(out)[0]["tokenizer.ggml.pre"] == "smollm"
