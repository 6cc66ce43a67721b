"""docs/families.md: one row for every family, of what the checks saw."""

import textwrap
from pathlib import Path

from .checks import Outcome
from .tiny import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEAD = f"""\
# Families

{len(FAMILIES)} families, a row each: of a tiny random checkpoint, four blocks in the hub's own
naming, that is pruned in memory and from disk to disk with widths in multiples of 8, or refused.

```bash
python -m tests.families --write      # makes this page; tests/families fails where it is not so
```

* **cut**: FFNs, routed experts, shared experts; (2/4): in 2 of 4 blocks.
* **stored**: the hub's names and shapes of the weights beside the model's own.
* **class**: what the result reloads as. *Own*: the family's class with a width per block, from the
  file beside the weights, by `trust_remote_code=True` or `import cfsp`. *Stock*: the family's class
  itself, which a plan of one width (`--uniform`) gives.
* **masked**: the logits are those of the dense model with the removed channels at zero, to 1e-5.
* **bytes**: what is written from disk to disk is what is written from memory.
* **reload**: a fresh process without cfsp has the same logits, to the last bit.
* **generates**: its greedy tokens, with a cache, are the same.

| family | `model_type` | cut | stored | class | masked | bytes | reload | generates |
|---|---|---|---|---|---|---|---|---|
"""


def row(outcome: Outcome) -> str:
    """The line of a family."""
    family = outcome.family
    start = f"| {family.title} | `{family.model_type}` |"
    if outcome.refused:
        return f"{start} refused: {reason(outcome.refused)} | {outcome.stored} | | | | | |\n"
    checks = " | ".join("yes" if passed else "**no**" for passed in outcome.checks)
    return f"{start} {outcome.cut} | {outcome.stored} | {outcome.classes} | {checks} |\n"


def reason(text: str) -> str:
    """Why a family is refused, no longer than a cell of a table may be."""
    return textwrap.shorten(text, 110, placeholder=" ...").replace("|", "\\|").replace("<", "&lt;")
