"""The tokenizer in a GGUF file: from ``tokenizer.json`` to llama.cpp's tables.

llama.cpp knows how text is split before BPE by a name. It is found by comparing the steps of the
tokenizer, not a hash of what it says to a text: so a vocabulary of one's own is fine.
"""

import json
from typing import Any

from ...errors import CfspError
from .source import ExportSource

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes, by words",), False): "gpt-2",
    (("digits", "bytes, by words"), False): "smollm",
    ((_WORDS + r"\p{N}{1,3}" + _REST, "bytes"), True): "llama-bpe",
    ((_WORDS + r"\p{N}" + _REST, "bytes"), False): "qwen2",
    ((_CASED, "bytes"), True): "tekken",
}
"""(Steps, whether a whole word of the vocabulary is taken without merges) -> llama.cpp's name."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def check_tokenizer(tokenizer: Any, vocab_size: int, pre: str | None) -> None:
    """Raise CfspError for a tokenizer that llama.cpp does not have, or one of another model."""
    backend = _backend(tokenizer)
    model = backend["model"]
    if model["type"] != "BPE":
        raise CfspError(f"gguf holds BPE tokenizers, not {model['type']}")
    if not model["merges"]:
        raise CfspError("llama.cpp reads no BPE tokenizer without merges; the model's has none")
    if pre is None:
        pre_tokenizer_name(backend)
    tokens = 1 + max(model["vocab"].values())
    if tokens > vocab_size:
        raise CfspError(f"the tokenizer has {tokens} tokens, the model only {vocab_size}")


def _backend(tokenizer: Any) -> dict[str, Any]:
    """What its tokenizer.json holds."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CfspError(f"gguf needs a tokenizer.json, not {type(tokenizer).__name__}")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def pre_tokenizer_name(backend: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text: "default" for a SentencePiece-like one;
    CfspError where none is known here."""
    if backend["model"].get("byte_fallback"):
        return "default"
    whole_words = bool(backend["model"].get("ignore_merges"))
    steps = tuple(_step(step) for step in _parts(backend.get("pre_tokenizer"), "pretokenizers"))
    name = PRE_TOKENIZERS.get((steps, whole_words))
    if name is None:
        raise CfspError(
            "the tokenizer splits text as none of llama.cpp's pre-tokenizers known here does "
            f"({', '.join(PRE_TOKENIZERS.values())}); `pre=NAME` says which of llama.cpp's it is"
        )
    return name


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step there is."""
    return list(step.get(key, [step])) if step is not None else []


def _step(step: dict[str, Any]) -> str:
    """What a step does, in short; its whole JSON where it is none of the usual ones."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes, by words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def write_tokenizer(writer: Any, source: ExportSource, pre: str | None) -> str:
    """Write it with special tokens and chat template; returns the name of the pre-tokenizer."""
    # gguf.SpecialVocab writes other bytes: it reads a saved tokenizer, says nothing of BOS where
    # there is no template, and takes no EOT from the generation config.
    tokenizer = source.opened.tokenizer
    backend = _backend(tokenizer)
    pre = pre or pre_tokenizer_name(backend)
    sentencepiece = bool(backend["model"].get("byte_fallback"))
    tokens, types = vocabulary(backend, source.config.vocab_size)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else m for m in backend["model"]["merges"]]
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores(merge_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends_space(backend))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _write_special_tokens(writer, source)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
    return pre


def vocabulary(backend: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and llama.cpp's type of it; numbers without one are unused, and
    added tokens without an embedding are left out."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    model = backend["model"]
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
        if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[number] = BYTE
    for added in backend["added_tokens"]:
        number = added["id"]
        if number < vocab_size:
            tokens[number] = added["content"]
            types[number] = CONTROL if added["special"] else USER_DEFINED
    if model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    return tokens, types


def merge_scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """SentencePiece's scores, which rank merges: the earlier one makes a token, the higher."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends_space(backend: dict[str, Any]) -> bool:
    normalizers = _parts(backend.get("normalizer"), "normalizers")
    splits = _parts(backend.get("pre_tokenizer"), "pretokenizers")
    prepended = [step["prepend"] for step in normalizers if step["type"] == "Prepend"]
    schemes = [step.get("prepend_scheme") for step in splits if step["type"] == "Metaspace"]
    # "\u2581" is SentencePiece's sign for a space.
    return "\u2581" in prepended or any(scheme != "never" for scheme in schemes)


def _write_special_tokens(writer: Any, source: ExportSource) -> None:
    """Their numbers, and whether the tokenizer puts BOS before a text and EOS after it."""
    tokenizer, config = source.opened.tokenizer, source.config
    numbers = {}
    for name in ("bos", "eos", "unk", "sep", "pad"):
        known = (getattr(part, f"{name}_token_id", None) for part in (tokenizer, config))
        number = next((number for number in known if number is not None), None)
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            numbers[name] = number
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a", verbose=False).input_ids
    writer.add_add_bos_token("bos" in numbers and ids[0] == numbers["bos"])
    writer.add_add_eos_token("eos" in numbers and ids[-1] == numbers["eos"])
    ends = getattr(source.opened.model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    others = [number for number in ends if number not in (None, numbers.get("eos"))]
    if others:
        writer.add_eot_token_id(others[0])
