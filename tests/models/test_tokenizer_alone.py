"""The tokenizer of a pruned folder loads where cfsp is not, and none of the folder's code runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer

import cfsp

from ..conftest import make_tokenizer
from .test_families import make, recipe_for

TEXT = "Hello the  world, 12 ünd\n<s> 3"


def byte_vocabulary(*special: str) -> dict[str, int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: number for number, token in enumerate([*letters, *special])}


def make_llama_tokenizer() -> LlamaTokenizer:
    tokens = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127))]
    tokens += [f"<0x{byte:02X}>" for byte in range(260 - len(tokens))]
    return LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


END = "<|endoftext|>"
TOKENIZERS = {
    "llama": make_llama_tokenizer,
    "gpt2": lambda: GPT2Tokenizer(vocab=byte_vocabulary(END), merges=[]),
    "qwen2": lambda: Qwen2Tokenizer(vocab=byte_vocabulary(END), merges=[]),
    "falcon": make_tokenizer,
    "bloom": make_tokenizer,
    "opt": make_tokenizer,
}
"""By family: the class differs, and how the family's config calls its number of blocks."""
ALONE = """
import json, sys
sys.modules["cfsp"] = None
from transformers import AutoTokenizer
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found = [type(tokenizer).__name__, tokenizer(sys.argv[1])["input_ids"], tokenizer.eos_token]
    print(json.dumps(found))
assert not [name for name in sys.modules if "modeling_cfsp" in name]
"""


@pytest.mark.parametrize("again", [False, True])
def test_it_needs_no_trust(tmp_path: Path, again: bool) -> None:
    expected, folders = [], []
    for name, tokenizer in TOKENIZERS.items():
        dense, out = tmp_path / name, tmp_path / f"{name}-out"
        make(name).save_pretrained(dense)
        tokenizer().save_pretrained(dense)
        result = cfsp.prune(
            dense, recipe=recipe_for(name, "cfsp"), out=out, eval_windows=0, progress=False
        )
        if again:  # as transformers itself writes it
            out = tmp_path / f"{name}-again"
            result.model.save_pretrained(out)
            result.tokenizer.save_pretrained(out)
        loaded = AutoTokenizer.from_pretrained(dense)
        expected.append([type(loaded).__name__, loaded(TEXT)["input_ids"], loaded.eos_token])
        folders.append(str(out))
    run = subprocess.run(
        [sys.executable, "-c", ALONE, TEXT, *folders],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert [json.loads(line) for line in run.stdout.splitlines()] == expected
