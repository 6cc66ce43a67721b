"""Real clients load what a prune and its exports write, and say what transformers says."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import cfsp

from .conftest import Reference, run

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
    questions = [
        ("The sun rises in the", [" east", " fridge"], 0),
        ("Two plus two is", [" banana", " four"], 1),
        ("The opposite of hot is", [" cold", " table"], 0),
        ("Fish live in", [" trees", " water"], 1),
        ("The colour of snow is", [" white", " seven"], 0),
        ("Paris is the capital of", [" Tuesday", " France"], 1),
        ("A triangle has three", [" sides", " wheels"], 0),
        ("At night we see the", [" soup", " moon"], 1),
    ]
    data = tmp_path / "questions.jsonl"
    rows = [{"query": query, "choices": c, "gold": gold} for query, c, gold in questions]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "cfsp_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "cfsp_questions.yaml").write_text(yaml.safe_dump(task))
    arguments = f"pretrained={reference.folder},trust_remote_code=True,dtype=float32"
    run(
        [lm_eval_python, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks",
         "cfsp_questions", "--include_path", tmp_path, "--device", "cpu", "--output_path",
         tmp_path / "results"]
    )  # fmt: skip
    (file,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(file.read_text())["results"]["cfsp_questions"]["acc,none"]
    assert accuracy == own_accuracy(reference, rows)


@torch.no_grad()
def own_accuracy(reference: Reference, rows: list[dict]) -> float:
    """The fraction of questions whose right choice the pruned model finds the most likely."""
    model, right = cfsp.load(reference.folder), 0
    for row in rows:
        context = len(reference.tokenizer(row["query"]).input_ids)
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([reference.tokenizer(row["query"] + choice).input_ids])
            predicted = model(ids).logits[0, context - 1 : -1].log_softmax(-1)
            scores.append(float(predicted.gather(1, ids[0, context:, None]).sum()))
        right += max(range(len(scores)), key=scores.__getitem__) == row["gold"]
    return right / len(rows)
