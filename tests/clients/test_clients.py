"""Real clients load what a prune and its exports write, and say what transformers says."""

import json
from pathlib import Path

import pytest

import cfsp

from .conftest import Reference, accuracy_in, run, write_questions

# One worker: the model is pruned once, and a client takes gigabytes.
pytestmark = pytest.mark.smollm2
WITHOUT_PLUGINS = {"VLLM_PLUGINS": ""}


def test_vllm_runs_a_pruned_folder_natively(reference: Reference, vllm_python: Path) -> None:
    """The entry point of the wheel: no trust flag, vLLM's own Llama with a width per block."""
    answer = reference.ask(vllm_python, "run_vllm.py", reference.folder)
    assert answer["model_class"] == "CFSPLlamaForCausalLM"
    assert answer["widths"] == reference.widths
    assert answer["tokens"] == reference.tokens


def test_vllm_runs_a_pruned_folder_through_transformers(
    reference: Reference, vllm_python: Path
) -> None:
    """Without our package: the modeling file in the folder, with the trust flag."""
    answer = reference.ask(
        vllm_python, "run_vllm.py", reference.folder, CFSP_TRUST="1", **WITHOUT_PLUGINS
    )
    assert "Transformers" in str(answer["model_class"])
    assert answer["tokens"] == reference.tokens


def test_vllm_runs_the_nemotron_nas_export_natively(
    reference: Reference, vllm_python: Path, tmp_path: Path
) -> None:
    out = tmp_path / "nas"
    cfsp.export(reference.folder, "nemotron-nas", out, progress=False)
    answer = reference.ask(vllm_python, "run_vllm.py", out, CFSP_TRUST="1", **WITHOUT_PLUGINS)
    assert answer["model_class"] == "DeciLMForCausalLM"
    assert answer["widths"] == reference.widths
    assert answer["tokens"] == reference.tokens


def test_llama_cpp_runs_the_gguf_export(
    reference: Reference, llama_cpp_python: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pruned.gguf"
    cfsp.export(reference.folder, "gguf", out, type="F32", progress=False)
    answer = reference.ask(llama_cpp_python, "run_llama_cpp.py", out)
    assert answer["tokens"] == reference.tokens
    assert answer["tokenized"] == reference.prompts


def test_lm_eval_runs_on_a_pruned_folder(
    reference: Reference, lm_eval_python: Path, tmp_path: Path
) -> None:
    """A stock run, with the trust flag and without our package, on a task of a few questions."""
    rows = write_questions(tmp_path)
    arguments = f"pretrained={reference.folder},trust_remote_code=True,dtype=float32"
    run(
        [lm_eval_python, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks",
         "cfsp_questions", "--include_path", tmp_path, "--device", "cpu", "--output_path",
         tmp_path / "results"]
    )  # fmt: skip
    (file,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(file.read_text())["results"]["cfsp_questions"]["acc,none"]
    assert accuracy == accuracy_in(rows, cfsp.load(reference.folder), reference.tokenizer)
