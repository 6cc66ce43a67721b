"""Clients run blocks with other heads and widths each, or without attention or FFN, tiny ones."""

from pathlib import Path

import pytest
import torch

import cfsp

from ..checkpoints.test_exports import VOCABULARY, family_tokenizer
from ..conftest import make_tiny
from ..mixed import write_mixed
from .conftest import Reference, reference_of
from .test_clients import WITHOUT_PLUGINS

HEAD = 32
"""vLLM's attention on a CPU takes heads of so many values."""
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "head_dim": HEAD,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
QWEN2 = {"hidden_size": 256, "head_dim": None}
GROUPS, WIDTHS = (3, 4, 1, 2), (96, 128, 40, 64)
GONE, NARROW = (0, 4, 0, 2), (96, 0, 40, 64)


def mixed(
    root: Path,
    family: str,
    groups: tuple[int, ...] = GROUPS,
    widths: tuple[int, ...] = WIDTHS,
    added_bias: bool = False,
    **values: object,
) -> Reference:
    model = make_tiny(family, **{**SIZES, **values})
    with torch.no_grad():  # never the likeliest: llama.cpp is told not to end, and does not say it
        model.get_output_embeddings().weight[SIZES["eos_token_id"]] = 0
    folder = write_mixed(model, family_tokenizer(family), root / family, groups, widths, added_bias)
    return reference_of(folder, list(widths))


def cache_bytes(groups: tuple[int, ...]) -> int:
    """Of the keys and values of a token, fp32."""
    return sum(groups) * 2 * HEAD * 4


@pytest.mark.parametrize(
    ("family", "groups", "widths", "added_bias"),
    [
        ("llama", GROUPS, WIDTHS, False),
        ("llama", GONE, NARROW, True),
        ("mistral", GONE, NARROW, False),
        ("qwen2", (0, 4, 0, 4), NARROW, False),
        ("qwen3", GONE, NARROW, False),
    ],
)
def test_vllm_with_cfsp_runs_the_folder(
    family: str,
    groups: tuple[int, ...],
    widths: tuple[int, ...],
    added_bias: bool,
    vllm_python: Path,
    tmp_path: Path,
) -> None:
    """As many bytes of KV cache a token as the plan says, none for an attention that is gone."""
    values = QWEN2 if family == "qwen2" else {}
    reference = mixed(tmp_path, family, groups, widths, added_bias, **values)
    answer = reference.ask(vllm_python, "run_vllm.py", reference.folder)
    assert str(answer["model_class"]).startswith("CFSP")
    assert answer["widths"] == reference.widths
    assert answer["cache_bytes"] == cache_bytes(groups)
    assert answer["tokens"] == reference.tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_vllm_without_cfsp_runs_the_folder(family: str, vllm_python: Path, tmp_path: Path) -> None:
    """Other heads in every block and no FFN in one, through vLLM's transformers backend."""
    reference = mixed(tmp_path, family, widths=NARROW)
    answer = reference.ask(
        vllm_python, "run_vllm.py", reference.folder, CFSP_TRUST="1", **WITHOUT_PLUGINS
    )
    assert "Transformers" in str(answer["model_class"])
    assert answer["cache_bytes"] == cache_bytes(GROUPS)
    assert answer["tokens"] == reference.tokens


def test_vllm_without_cfsp_runs_no_block_without_attention(
    vllm_python: Path, tmp_path: Path
) -> None:
    reference = mixed(tmp_path, "llama", GONE)
    with pytest.raises(AssertionError, match="Layer 0 does not dispatch through the Transformers"):
        reference.ask(
            vllm_python, "run_vllm.py", reference.folder, CFSP_TRUST="1", **WITHOUT_PLUGINS
        )


def test_vllm_runs_no_ops_of_the_nemotron_nas_export(vllm_python: Path, tmp_path: Path) -> None:
    groups = (2, 2, 0, 2)
    reference = mixed(tmp_path, "llama", groups, NARROW)
    cfsp.export(reference.folder, "nemotron-nas", tmp_path / "nas", progress=False)
    answer = reference.ask(
        vllm_python, "run_vllm.py", tmp_path / "nas", CFSP_TRUST="1", **WITHOUT_PLUGINS
    )
    assert answer["model_class"] == "DeciLMForCausalLM"
    assert answer["cache_bytes"] == cache_bytes(groups)
    assert answer["tokens"] == reference.tokens


@pytest.mark.parametrize(
    ("family", "arch", "groups", "widths", "added_bias"),
    [
        ("llama", "deci", GROUPS, WIDTHS, False),
        ("llama", "deci", (4, 0, 3, 0), (96, 0, 0, 64), True),
        ("llama", "llama", (2,) * 4, (96,) * 4, False),
        ("qwen2", "deci", (4, 0, 3, 1), NARROW, False),
        ("qwen3", "openelm", GROUPS, NARROW, False),
        ("qwen3", "qwen3", (2,) * 4, (96,) * 4, False),
    ],
)
def test_llama_cpp_runs_the_gguf_export(
    family: str,
    arch: str,
    groups: tuple[int, ...],
    widths: tuple[int, ...],
    added_bias: bool,
    llama_cpp_python: Path,
    tmp_path: Path,
) -> None:
    values = QWEN2 if family == "qwen2" else {"tie_word_embeddings": family == "qwen3"}
    reference, out = mixed(tmp_path, family, groups, widths, added_bias, **values), tmp_path / "m"
    out = out.with_suffix(".gguf")
    result = cfsp.export(reference.folder, "gguf", out, type="F32", progress=False)
    assert result.details["architecture"] == arch
    answer = reference.ask(llama_cpp_python, "run_llama_cpp.py", out)
    assert answer["tokens"] == reference.tokens


def test_vllm_runs_a_padded_folder_with_zero_heads(vllm_python: Path, tmp_path: Path) -> None:
    reference = mixed(tmp_path, "qwen3")
    cfsp.export(reference.folder, "padded", tmp_path / "padded", progress=False)
    answer = reference.ask(vllm_python, "run_vllm.py", tmp_path / "padded", **WITHOUT_PLUGINS)
    assert answer["model_class"] == "Qwen3ForCausalLM"
    assert answer["tokens"] == reference.tokens
