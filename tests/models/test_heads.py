"""Classifiers, question answering and adapters on a pruned folder, as on the dense one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import cfsp
from cfsp.models import modeling_cfsp

from ..conftest import make_tokenizer
from .test_families import UNIFORM, make, recipe_for

FOLDERS = [
    *((name, "cfsp") for name in ("llama", "qwen2", "mistral", "gpt2", "phi3", "opt", "mixtral")),
    *((name, UNIFORM) for name in ("mistral", "gpt2", "phi3")),
]
HEADS = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
IDS = torch.arange(24)[None] * 11 % 256


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Pruned folders, beside each the dense one."""
    root, found = tmp_path_factory.mktemp("heads"), {}
    for name, case in FOLDERS:
        dense, out = root / name, root / f"{name}-{case}"
        if not dense.exists():
            make(name).save_pretrained(dense)
            make_tokenizer().save_pretrained(dense)
        cfsp.prune(dense, None, recipe_for(name, case), out, eval_windows=0, progress=False)
        found[name, case] = out
    return found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", FOLDERS, ids="-".join)
@torch.no_grad()
def test_a_head_is_put_on_the_decoder_of_a_pruned_folder(
    case: tuple[str, str], head: str, folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    out, auto = folders[case], getattr(transformers, head)
    try:
        auto.from_pretrained(out.with_name(case[0]))
    except ValueError:  # the family has no such class
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            auto.from_pretrained(out)
        return
    model, info = auto.from_pretrained(out, output_loading_info=True)
    assert {key.partition(".")[0] for key in info["missing_keys"]} <= {
        "score",
        "classifier",
        "qa_outputs",
    }
    assert info["missing_keys"]
    assert not info["mismatched_keys"]
    hidden = AutoModelForCausalLM.from_pretrained(out).base_model(input_ids=IDS)[0]
    assert torch.equal(model.eval().base_model(input_ids=IDS)[0], hidden)
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(again.eval()(input_ids=IDS)[0], model(input_ids=IDS)[0])


WITHOUT_CFSP = """
import sys, torch, transformers
sys.modules["cfsp"] = None
ids = torch.arange(24)[None] * 11 % 256
for folder in sys.argv[1:]:
    load = dict(trust_remote_code=True)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, **load)
    hidden = lm.base_model(input_ids=ids)[0]
    for head, class_name in lm.config.auto_map.items():
        if head.startswith("AutoModel"):
            model = getattr(transformers, head).from_pretrained(folder, **load).eval()
            assert type(model).__name__ == class_name.partition(".")[2], type(model)
            assert torch.equal(model.base_model(input_ids=ids)[0], hidden), (folder, head)
            print(head)
"""


def test_heads_load_where_cfsp_is_not_installed(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    pruned = [str(out) for (_, case), out in folders.items() if case != UNIFORM]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_CFSP, *pruned],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    counts = [run.stdout.split().count(head) for head in modeling_cfsp.AUTO_CLASSES]
    # None takes images, OPT does not classify tokens, Phi3 answers no questions.
    assert counts == [7, 7, 0, 7, 6, 6]


QUIET = """
import sys, cfsp
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    for auto in (AutoModel, AutoModelForCausalLM):
        auto.from_pretrained(folder)
"""


def test_loading_warns_of_no_widths(folders: dict[tuple[str, str], Path]) -> None:
    pruned = [str(out) for (_, case), out in folders.items() if case != UNIFORM]
    run = subprocess.run([sys.executable, "-c", QUIET, *pruned], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "per-layer" not in run.stderr + run.stdout


DEFAULTS = """
import sys
{imports}
from transformers import AutoModelForCausalLM
for dense, pruned in zip(sys.argv[1::2], sys.argv[2::2]):
    for kind in ("LoraConfig", "IA3Config"):
        names = []
        for folder in (dense, pruned):
            config = getattr(peft, kind)(task_type="CAUSAL_LM")
            adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
            names.append([name for name, p in adapted.named_parameters() if p.requires_grad])
        assert names[0] and names[0] == names[1], names
"""


@pytest.mark.parametrize("imports", ["import cfsp, peft", "import peft, cfsp"])
def test_peft_adapts_by_default_what_it_adapts_in_the_dense_family(
    imports: str, folders: dict[tuple[str, str], Path]
) -> None:
    pytest.importorskip("peft")
    pairs = []
    for name in ("llama", "gpt2", "opt", "mistral"):
        out = folders[name, "cfsp"]
        pairs += [str(out.with_name(name)), str(out)]
    run = subprocess.run(
        [sys.executable, "-c", DEFAULTS.format(imports=imports), *pairs],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
