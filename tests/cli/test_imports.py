"""What an import costs, and that transformers knows pruned models whichever is imported first."""

import subprocess
import sys
from pathlib import Path

import pytest

import cfsp
from cfsp.auto_classes import CLASS_PREFIX, PRUNED_PREFIX
from cfsp.cli.main import COMMANDS
from cfsp.models import layouts, modeling_cfsp

from ..conftest import TEXT

HEAVY = {"torch", "transformers", "datasets", "numpy", "rich", "yaml", "jinja2"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that must not fail."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("arguments", [("-c", "import cfsp"), ("-m", "cfsp", "--help")])
def test_neither_the_package_nor_its_help_imports_torch(arguments: tuple[str, ...]) -> None:
    done = python("-X", "importtime", *arguments)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "cfsp.errors" in imported
    assert not imported & HEAVY
    for command in COMMANDS if "--help" in arguments else ():
        assert f"\n    {command}" in done.stdout


def test_every_public_name_is_there() -> None:
    for name in cfsp.__all__:
        assert getattr(cfsp, name).__name__ == name
    assert set(cfsp.__all__) <= set(dir(cfsp))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cfsp.nothing


def test_what_is_written_down_twice_agrees() -> None:
    script = """
import cfsp
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names
print(*names)"""
    known = python("-c", script).stdout.split()
    assert {PRUNED_PREFIX + family for family in layouts.LAYOUTS} <= set(known)
    assert layouts.PRUNED_PREFIX == PRUNED_PREFIX == modeling_cfsp.MODEL_TYPE_PREFIX
    assert modeling_cfsp.PREFIX == CLASS_PREFIX


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with per-block widths."""
    from ..conftest import make_tiny, make_tokenizer

    dense, out = (tmp_path_factory.mktemp("imports") / name for name in ("dense", "pruned"))
    make_tiny().save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    calibration = cfsp.Calibration(dataset=TEXT, samples=2, seqlen=32)
    recipe = cfsp.Recipe(scorer="cfsp", width_multiple=1, calibration=calibration)
    cfsp.prune(dense, None, recipe, out, eval_windows=0, progress=False)
    return out


LOAD = "AutoModelForCausalLM.from_pretrained(folder)"
FROM_CONFIG = "AutoModel.from_config(AutoConfig.from_pretrained(folder))"
UNPICKLED = "AutoModel.from_config(CFSPLlamaConfig.from_pretrained(folder))"


@pytest.mark.parametrize(
    ("imports", "expression", "name"),
    [
        ("import cfsp, transformers", f"transformers.{LOAD}", "CFSPLlamaForCausalLM"),
        ("import transformers, cfsp", f"transformers.{LOAD}", "CFSPLlamaForCausalLM"),
        ("from transformers import *; import cfsp", LOAD, "CFSPLlamaForCausalLM"),
        ("import cfsp; from transformers import *", FROM_CONFIG, "CFSPLlamaModel"),
        ("from transformers import AutoConfig; import cfsp; from transformers import *",
         FROM_CONFIG, "CFSPLlamaModel"),
        ("import cfsp; from transformers.models.llama.modeling_llama import LlamaModel; "
         "from transformers import AutoModelForCausalLM", LOAD, "CFSPLlamaForCausalLM"),
        ("import cfsp; from transformers import modeling_utils, AutoModelForCausalLM", LOAD,
         "CFSPLlamaForCausalLM"),
        ("from cfsp.models.modeling_cfsp import CFSPLlamaConfig; from transformers import *",
         UNPICKLED, "CFSPLlamaModel"),
    ],
)  # fmt: skip
def test_transformers_loads_a_pruned_folder(
    imports: str, expression: str, name: str, pruned: Path
) -> None:
    imports = imports.replace("import *", "import AutoConfig, AutoModel, AutoModelForCausalLM")
    script = f"{imports}\nfolder = {str(pruned)!r}\nprint(type({expression}).__name__)"
    assert python("-c", script).stdout.strip() == name


def test_saving_writes_the_modeling_file_and_the_tokenizer_loads(
    pruned: Path, tmp_path: Path
) -> None:
    script = f"""
import cfsp
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained({str(pruned)!r}).save_pretrained({str(tmp_path)!r})
print(AutoTokenizer.from_pretrained({str(pruned)!r}).vocab_size)
"""
    assert int(python("-c", script).stdout) > 0
    assert (tmp_path / "modeling_cfsp.py").is_file()
    assert '"auto_map"' in (tmp_path / "config.json").read_text()
