"""One dense pass: the numbers, what it leaves behind, what it costs in memory, and its file."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cfsp.calibration.collect import collect_statistics
from cfsp.calibration.statistics import (
    INFLUENCE_METRICS,
    Statistics,
    check_statistics,
    load_statistics,
    save_statistics,
)
from cfsp.errors import CfspError
from cfsp.models.blocks import LiveBlocks
from cfsp.models.layouts import LAYOUTS
from cfsp.models.parts import ffn as ffns
from cfsp.models.parts import part as parts

from ..conftest import FAMILIES, make_tiny

LLAMA = LAYOUTS["llama"]


def collect(model: PreTrainedModel, windows: torch.Tensor, **options: object) -> Statistics:
    layout = LAYOUTS[model.config.model_type]
    return collect_statistics(model, layout, windows, progress=False, **options)


@torch.no_grad()
def whole_model_reference(
    model: PreTrainedModel, windows: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """FFN activations [T, F] and hidden states [T, D] per block from one ordinary forward."""
    activations: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: activations.append(args[0].flatten(0, 1).double())
        )
        for block in model.model.layers
    ]
    hooks += [
        block.register_forward_pre_hook(
            lambda module, args: states.append(args[0].flatten(0, 1).double())
        )
        for block in model.model.layers
    ]
    hooks.append(
        model.model.norm.register_forward_pre_hook(
            lambda module, args: states.append(args[0].flatten(0, 1).double())
        )
    )
    model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return activations, states


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_an_ordinary_forward(family: str, windows: torch.Tensor) -> None:
    model = make_tiny(family)
    activations, states = whole_model_reference(model, windows)
    found = collect(model, windows, micro_batch=4)  # the last micro-batch is ragged
    for number, block in enumerate(found.blocks):
        x, before, after = activations[number], states[number], states[number + 1]
        assert block.tokens == windows.numel()
        assert torch.allclose(block.mean, x.mean(0), rtol=1e-5, atol=1e-8)
        assert torch.allclose(block.variance, x.var(0, correction=0), rtol=1e-5, atol=1e-9)
        assert torch.allclose(block.norm, (x.square().sum(0) / len(windows)).sqrt(), rtol=1e-6)
        cosine = torch.cosine_similarity(before, after, dim=-1, eps=0)
        expected = {
            "angular": cosine.clamp(-1, 1).arccos() / torch.pi,
            "cosine": 1 - cosine,
            "mse": (after - before).square().mean(-1),
            "mae": (after - before).abs().mean(-1),
        }
        for metric in INFLUENCE_METRICS:
            assert block.importance(metric) == pytest.approx(float(expected[metric].mean()), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_op_and_the_plain_one_give_the_same_numbers(
    family: str, dtype: torch.dtype, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for module, name in ((ffns, "swiglu_statistics"), (parts, "channel_statistics")):
        op = getattr(module, name)

        def counted(*args: object, name: str = name, op: Callable = op, **more: object) -> object:
            calls.append(name)
            return op(*args, **more)

        monkeypatch.setattr(module, name, counted)
    model = make_tiny(family).to(dtype)
    fused, plain = (collect(model, windows, fused=fused) for fused in (True, False))
    assert calls == ["swiglu_statistics"] * 24 + ["channel_statistics"] * 24
    for a, b in zip(fused.blocks, plain.blocks, strict=True):
        assert torch.equal(a.sum, b.sum)
        assert torch.equal(a.sum_of_squares, b.sum_of_squares)
        assert torch.equal(a.influence, b.influence)


def test_an_ffn_that_computes_something_else_is_observed_at_its_down_projection(
    windows: torch.Tensor,
) -> None:
    dense, odd = make_tiny(), make_tiny()
    for layer in odd.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()
    assert LLAMA.ffns[0].gated_activation(dense.model.layers[0]) == "silu"
    assert LLAMA.ffns[0].gated_activation(odd.model.layers[0]) is None
    activations, _ = whole_model_reference(odd, windows)
    found = collect(odd, windows)
    assert torch.allclose(found.blocks[3].mean, activations[3].mean(0), rtol=1e-5, atol=1e-8)


def test_the_model_is_left_as_it_was_found(windows: torch.Tensor) -> None:
    model = make_tiny().train()
    own_forward = model.model.layers[1].forward
    model.model.layers[1].forward = own_forward
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, windows)
    assert model.training
    assert model.model.layers[1].__dict__["forward"] is own_forward
    assert "forward" not in model.model.layers[0].__dict__
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"block 2: mlp\.up_proj\.weight holds NaN"),
        (3e38, r"block 2 gave NaN .* in calibration window 0"),  # finite, its products are not
    ],
)
def test_it_is_left_so_after_an_error_too(
    value: float, message: str, windows: torch.Tensor
) -> None:
    model = make_tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3] = value
    with pytest.raises(CfspError, match=message):
        collect(model, windows)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_each_block_runs_once_over_each_token(windows: torch.Tensor) -> None:
    model = make_tiny()
    seen = [0] * 4
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda module, args, output, number=number: seen.__setitem__(
                number, seen[number] + args[0].shape[0] * args[0].shape[1]
            )
        )
    collect(model, windows, micro_batch=4)
    assert seen == [windows.numel()] * 4


def test_same_inputs_give_the_same_bits(windows: torch.Tensor) -> None:
    first, second = (collect(make_tiny(), windows, micro_batch=2) for _ in range(2))
    for a, b in zip(first.blocks, second.blocks, strict=True):
        assert torch.equal(a.sum_of_squares, b.sum_of_squares)
        assert torch.equal(a.influence, b.influence)


def test_nothing_is_sized_by_the_maximum_position(windows: torch.Tensor) -> None:
    model = make_tiny(max_position_embeddings=2**40)
    assert len(collect(model, windows).blocks) == 4


MEMORY = """
import sys, torch
sys.path.insert(0, {root!r})
from tests.conftest import make_tiny
from cfsp.models.layouts import LAYOUTS
from cfsp.models.parts import ffn as ffns
from cfsp.calibration.collect import collect_statistics
torch.set_num_threads(1)
model = make_tiny(hidden_size=256, intermediate_size=32, num_hidden_layers=3)
windows = torch.randint(0, 256, (1, 128))
collect_statistics(model, LAYOUTS["llama"], windows, progress=False)  # warm up
def peak():  # of this process image: getrusage would carry the parent's over
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0])
before = peak()
collect_statistics(model, LAYOUTS["llama"], windows.expand(1600, -1), progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_hidden_states_once_and_a_micro_batch() -> None:
    """1600 windows of 128 tokens, D = 256, fp32: 200 MiB of hidden states over 3 blocks."""
    root = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, "-c", MEMORY.format(root=root)], capture_output=True, text=True, check=True
    )
    grown, hidden = int(run.stdout) / 1024, 200
    assert hidden <= grown < hidden * 1.25


def test_the_file_round_trips(windows: torch.Tensor, tmp_path: Path) -> None:
    found = collect(make_tiny(), windows, provenance={"calibration": None})
    save_statistics(found, tmp_path / "a" / "s.safetensors")
    back = load_statistics(tmp_path / "a" / "s.safetensors")
    assert back.provenance == json.loads(json.dumps(found.provenance))
    for a, b in zip(found.blocks, back.blocks, strict=True):
        assert (a.tokens, a.windows) == (b.tokens, b.windows)
        assert torch.equal(a.sum, b.sum)
        assert torch.equal(a.influence, b.influence)
    save_statistics(back, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "a" / "s.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "again"]


def test_statistics_of_another_model_are_refused(
    windows: torch.Tensor, tiny: Callable[..., PreTrainedModel]
) -> None:
    found = collect(tiny(), windows)
    check_statistics(found, LiveBlocks(tiny(), LLAMA))
    check_statistics(found, LiveBlocks(tiny().to(torch.bfloat16), LLAMA))
    with pytest.raises(CfspError, match="same shapes, different weights"):
        check_statistics(found, LiveBlocks(tiny(seed=1), LLAMA))
    with pytest.raises(CfspError, match="4 blocks with 192 channels in all, the model has 3 w"):
        check_statistics(found, LiveBlocks(tiny(num_hidden_layers=3), LLAMA))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    with pytest.raises(CfspError, match="cannot read statistics"):
        load_statistics(tmp_path / "x")
    with pytest.raises(CfspError, match="cannot read statistics"):
        load_statistics(tmp_path / "absent")
    make_tiny().save_pretrained(tmp_path / "m")
    with pytest.raises(CfspError, match="is not a statistics file of this version"):
        load_statistics(tmp_path / "m" / "model.safetensors")
