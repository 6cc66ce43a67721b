"""docs/drop-in.md: its code runs, and computes what the plain formulations compute."""

import re
from pathlib import Path

import pytest
import torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "drop-in.md"


@pytest.fixture
def blocks() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert len(found) == 5
    return found


def down_inputs(ffn, batches, model):
    """[T, F] fp64: what reaches the down projection of ``ffn``."""
    rows = []
    handle = ffn.down_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat([r.flatten(0, -2) for r in rows]).double()


def test_code_of_the_document(blocks):
    scope: dict = {"__name__": "drop_in"}
    exec(blocks[0], scope)
    exec(blocks[1], scope)
    model, batches = scope["model"], scope["batches"]
    before = model(batches[0])
    for ffn, score in scope["wanda_scores"].items():
        x = down_inputs(ffn, batches, model)
        exact = ffn.down_proj.weight.double().abs().mean(0) * x.norm(dim=0)
        torch.testing.assert_close(score.double(), exact, rtol=1e-5, atol=0)

    exec(blocks[2], scope)
    assert [tuple(ffn.down_proj.weight.shape) for ffn in model] == [(64, 192)] * 2
    after = model(batches[0])
    assert after.shape == before.shape
    assert (after - before).norm() < 0.7 * before.norm()

    exec(blocks[3], scope)
    model = scope["model"]
    for ffn, score in scope["flap_scores"].items():
        x = down_inputs(ffn, batches, model)
        down = ffn.down_proj.weight.double()
        exact = down.square().sum(0) * x.var(0, correction=0)
        torch.testing.assert_close(score.double(), exact, rtol=1e-4, atol=0)
        removed = score.argsort()[:64]
        bias = down[:, removed] @ x.mean(0)[removed]
        torch.testing.assert_close(scope["biases"][ffn].double(), bias, rtol=1e-3, atol=1e-6)

    exec(blocks[4], scope)
    statistics = scope["LayerStatistics"](None)
    statistics.add_batch(batches[0], None)
    exact = batches[0].double().flatten(0, 1).square().mean(0)
    torch.testing.assert_close(statistics.scaler_row.double(), exact, rtol=1e-5, atol=0)
