"""Tiny random models, a byte tokenizer, and SmolLM2-135M where its package is installed."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_MININTERVAL", "10")
if not torch.cuda.is_available():
    # Counts when Triton is first imported, which some module may do long before a kernel test.
    os.environ["TRITON_INTERPRET"] = "1"

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Threads that wait for a core cost far more than they give.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import cfsp
from cfsp.calibration.statistics import Statistics
from cfsp.cli.demo import demo_model, dense_folder
from cfsp.errors import CfspError

SHARED = Path(__file__).resolve().parents[2] / "shared"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""For tests of what families share; tests/models/test_families.py goes through all of them."""
TEXT = str(Path(__file__).resolve().parents[1] / "LICENSE")
"""Enough for tiny models, and read in a fiftieth of the time that the builtin text takes."""
TINY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def make_tiny(model_type: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random causal LM whose blocks all do something; None leaves a value to the family."""
    values = {key: value for key, value in {**TINY, **overrides}.items() if value is not None}
    config = AutoConfig.for_model(model_type, **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.05)
    return model


def make_tokenizer(puts_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte; BOS 256, EOS 257, padding 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    if puts_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 256)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


LONGEST = ("smollm2", "streaming", "prune", "ranks", "families", "resume", "benchmark_suite", "cli")
"""Files that take longest come first, so that two workers with a file each end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of :data:`LONGEST`, then as they were found."""
    place = {f"test_{name}": position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@contextmanager
def one_thread_at_a_time() -> Iterator[None]:
    """The grouped products of experts give other last bits where weights lie otherwise in memory
    and several threads share them; with one thread they do not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_fresh(*arguments: str, home: Path, cwd: Path | None = None) -> None:
    """Run Python with these arguments, offline, in an environment that has nothing of ours."""
    run = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """See :func:`one_thread_at_a_time`."""
    with one_thread_at_a_time():
        yield


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    return make_tiny


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny Llama saved with its tokenizer."""
    folder = tmp_path / "tiny"
    make_tiny().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def windows() -> torch.Tensor:
    """[6, 24] calibration tokens."""
    return torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as an ordinary fp32 model folder."""
    try:
        demo_model()
    except CfspError as error:
        pytest.skip(str(error))
    return dense_folder(tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct")


def shared(path: str) -> Path:
    """A data file beside the checkout; skips the test where it is absent."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"{path} is not beside the checkout")
    return file


@pytest.fixture(scope="session")
def wikitext_recipe() -> cfsp.Recipe:
    """CFSP at 30%, exact widths, on 48 windows of WikiText-2 validation."""
    dataset = str(shared("data/wikitext2-validation.parquet"))
    calibration = cfsp.Calibration(dataset=dataset, samples=48, seqlen=1024, seed=0)
    return cfsp.Recipe(scorer="cfsp", width_multiple=1, calibration=calibration)


@pytest.fixture(scope="session")
def wikitext_statistics(smollm2: Path, wikitext_recipe: cfsp.Recipe) -> Statistics:
    """Statistics of SmolLM2-135M for that recipe: the one long calibration of the tests."""
    return cfsp.calibrate(smollm2, recipe=wikitext_recipe, progress=False)
