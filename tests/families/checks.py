"""What becomes of a family: pruned in memory and from disk to disk, compared, and reloaded."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

import cfsp
from cfsp.errors import CfspError
from cfsp.io.safetensors import read_index
from cfsp.models.layouts import Layout
from cfsp.models.loading import quiet_loading
from cfsp.models.opening import open_model

from ..conftest import TEXT, make_tokenizer, one_thread_at_a_time, run_fresh
from .fresh import TOKENS, said
from .tiny import FAMILIES, Family

RECIPE = cfsp.Recipe(
    scorer="cfsp",
    sparsity=0.3,
    width_multiple=8,
    micro_batch=2,
    calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=16),
)
UNIFORM = replace(RECIPE, sparsity=1 / 3, uniform=True)
OPTIONS = {"eval_windows": 0, "progress": False}
OF_THE_RUN = {"README.md", "recipe.yaml", "tokenizer_config.json"}
"""Files that say what was pruned and when."""


@dataclass(frozen=True)
class BothWays:
    """A family's dense folder and what came of it, in memory and from disk to disk."""

    dense: Path
    in_memory: cfsp.PruneResult
    streamed: cfsp.PruneResult


@dataclass(frozen=True)
class Outcome:
    """One row of the table: what was seen, or why a family is refused."""

    family: Family
    stored: str
    """How the hub's names of the weights compare with the model's."""
    refused: str = ""
    cut: str = ""
    classes: str = ""
    """What its results reload as, of several widths and of one."""
    checks: tuple[bool, ...] = ()
    """Masked equality, equal bytes, reload, generation."""


@dataclass(frozen=True)
class Pruned:
    """The results of a family whose reload is still to come."""

    family: Family
    stored: str
    cut: str
    masked: bool
    bytes_equal: bool
    said: dict[str, object]
    """By the result in memory."""
    uneven: Path
    uniform: Path | None
    """None where the family has no stock class of one smaller width."""


def outcomes(names: Iterable[str], root: Path) -> dict[str, Outcome]:
    """The rows of these families; one other process reloads all of their results."""
    with one_thread_at_a_time(), quiet_loading():
        found = {name: prune(FAMILIES[name], root / name) for name in names}
        pruned = {name: case for name, case in found.items() if isinstance(case, Pruned)}
        reload(pruned.values(), root / "hf")
        rows = {name: judge(case) for name, case in pruned.items()}
    return {name: case if isinstance(case, Outcome) else rows[name] for name, case in found.items()}


def prune(family: Family, root: Path) -> Pruned | Outcome:
    """A family's tiny checkpoint pruned both ways; an Outcome where it is refused."""
    dense = root / "dense"
    model = family.model()
    model.save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    stored = how_stored(model, dense)
    try:
        opened = open_model(dense)
        in_memory = cfsp.prune(
            opened.model, opened.tokenizer, RECIPE, root / "in-memory", **OPTIONS
        )
    except CfspError as error:
        return Outcome(family, stored, refused=short(error, dense))
    streamed = cfsp.prune(dense, recipe=RECIPE, out=root / "uneven", **OPTIONS)
    uniform: Path | None = root / "uniform"
    try:
        cfsp.prune(dense, recipe=UNIFORM, out=uniform, **OPTIONS)
    except CfspError:
        uniform = None
    return Pruned(
        family,
        stored,
        what_is_cut(opened.layout, model),
        is_masked_equal(model, opened.layout, in_memory),
        have_equal_bytes(in_memory.out, streamed.out),
        said(in_memory.model),
        streamed.out,
        uniform,
    )


def short(error: CfspError, folder: Path) -> str:
    """An error's reason, without the names of the model and of what is supported."""
    reason = str(error).partition("; supported: ")[0].replace(str(folder), "the folder")
    return re.sub(r"^unsupported architecture '\w+': ", "", reason)


def how_stored(model: PreTrainedModel, folder: Path) -> str:
    """What the hub's naming makes of a family's parameters."""
    stored = {name: info.shape for name, info in read_index(folder).items()}
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    own = {k: shape for k, shape in own.items() if k not in model.all_tied_weights_keys}
    if len(stored) > len(own):
        return "experts apart"
    if sorted(stored) != sorted(own):
        return "renamed"
    return "one for one" if stored == own else "transposed"


def what_is_cut(layout: Layout, model: PreTrainedModel) -> str:
    """The kinds of FFN that are cut, and in how many of the blocks where not in all."""
    blocks = layout.find_blocks(model)
    kinds: Counter[str] = Counter()
    for _, block, ffn in layout.parts_of(model):
        beside_experts = any(units.experts > 1 for units in layout.units(block))
        other = "shared" if beside_experts else "FFN"
        kinds["experts" if ffn.units(block).experts > 1 else other] += 1
    counts = {kind: f" ({n}/{len(blocks)})" if n < len(blocks) else "" for kind, n in kinds.items()}
    return ", ".join(f"{kind}{count}" for kind, count in counts.items())


@torch.no_grad()
def is_masked_equal(model: PreTrainedModel, layout: Layout, result: cfsp.PruneResult) -> bool:
    """Whether a result is the dense model with its removed channels at zero, which is another
    function than the dense one."""
    whole = model(input_ids=TOKENS, use_cache=False).logits
    blocks = layout.find_blocks(model)
    for block, plan in zip(blocks, result.plan.blocks, strict=True):
        for ffn, kept, units in zip(layout.block_parts(block), plan.kept, plan.units, strict=True):
            (down,) = (name for name in ffn.weight_names if name.startswith(ffn.down))
            parameter = block.get_parameter(down)
            experts = parameter if parameter.dim() == 3 else parameter[None]
            dimension = ffn.channels[down].dimension - (parameter.dim() == 3)
            for expert, own in zip(experts, kept, strict=True):
                gone = torch.ones(expert.shape[dimension], dtype=torch.bool)
                gone[units.columns_of(own)] = False
                expert.index_fill_(dimension, gone.nonzero()[:, 0], 0)
    masked = model(input_ids=TOKENS, use_cache=False).logits
    pruned = result.model(input_ids=TOKENS, use_cache=False).logits
    changed = not torch.allclose(whole, masked, atol=1e-3, rtol=1e-3)
    return changed and torch.allclose(pruned, masked, atol=1e-5, rtol=1e-5)


def have_equal_bytes(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files."""
    names = {path.name for path in a.iterdir()}
    return names == {path.name for path in b.iterdir()} and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names - OF_THE_RUN
    )


def reload(cases: Iterable[Pruned], home: Path) -> None:
    """Have every result reloaded by another process, without cfsp."""
    arguments: list[str] = []
    for case in cases:
        auto = "AutoModelForImageTextToText" if case.family.multimodal else "AutoModelForCausalLM"
        for folder in (case.uneven, case.uniform):
            arguments += [str(folder), auto] if folder is not None else []
    run_fresh(str(Path(__file__).with_name("fresh.py")), *arguments, home=home)


def judge(case: Pruned) -> Outcome:
    """The row of a family, from what the other process made of its results."""
    uneven = torch.load(f"{case.uneven}.answer")
    kinds = ["own" if uneven.get("class", "").startswith("CFSP") else "stock"]
    reloaded = "error" not in uneven and torch.equal(uneven["logits"], case.said["logits"])
    generated = "error" not in uneven and torch.equal(uneven["tokens"], case.said["tokens"])
    if case.uniform is not None:
        uniform = torch.load(f"{case.uniform}.answer")
        kinds.append("own" if uniform.get("class", "CFSP").startswith("CFSP") else "stock")
        reloaded &= "error" not in uniform
    return Outcome(
        case.family,
        case.stored,
        cut=case.cut,
        classes=", ".join(dict.fromkeys(kinds)),
        checks=(case.masked, case.bytes_equal, reloaded, generated),
    )
