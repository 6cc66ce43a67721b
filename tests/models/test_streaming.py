"""One block at a time: the same numbers and the same bytes as with the whole model in memory."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import cfsp
from cfsp.calibration.collect import collect_statistics
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoints import folder as checkpoint
from cfsp.errors import CfspError
from cfsp.io.safetensors import read_header
from cfsp.models.blocks import StoredBlocks
from cfsp.models.fingerprints import model_fingerprint
from cfsp.models.loading import DEVICE, model_device, outer_weights
from cfsp.models.opening import OpenModel, open_model, open_streamed
from cfsp.pruning import compaction_streamed as second_pass
from cfsp.run import disk_to_disk

from ..conftest import FAMILIES, TEXT, make_tiny, make_tokenizer


def saved(folder: Path, family: str = "llama", shards: bool = False, **config: object) -> Path:
    """A tiny model with its tokenizer, in one file or in several."""
    dtype = config.pop("dtype", torch.float32)
    model = make_tiny(family, **config).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
    make_tokenizer().save_pretrained(folder)
    return folder


def streamed(folder: Path | str, **options: str) -> OpenModel:
    opened = open_streamed(folder, **options)
    assert opened is not None
    return opened


def collect(opened: OpenModel, windows: torch.Tensor) -> Statistics:
    return collect_statistics(
        opened.model, opened.layout, windows, micro_batch=4, progress=False, weights=opened.blocks
    )


def assert_equal(a: Statistics, b: Statistics) -> None:
    assert a.model_fingerprint == b.model_fingerprint
    assert a.provenance == b.provenance
    assert len(a.blocks) == len(b.blocks) == 4
    for left, right in zip(a.blocks, b.blocks, strict=True):
        assert left.tokens == right.tokens
        for name in ("sum", "sum_of_squares", "influence"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name


def resident(model: PreTrainedModel) -> list[str]:
    """Parameters of blocks that are in memory."""
    return [n for n, p in model.model.layers.named_parameters() if p.device.type != "meta"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_statistics_are_those_of_the_model_in_memory(
    family: str, dtype: torch.dtype, tied: bool, windows: torch.Tensor, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", family, True, dtype=dtype, tie_word_embeddings=tied)
    assert len(list(folder.glob("*.safetensors"))) > 3
    opened = streamed(folder)
    found = collect(opened, windows)
    whole = open_model(folder)
    assert whole.model.dtype == opened.model.dtype == dtype
    assert_equal(found, collect(whole, windows))
    assert not resident(opened.model)
    assert found.model_fingerprint == model_fingerprint(whole.model, whole.layout)
    assert opened.name == whole.name
    assert opened.model.generation_config.to_dict() == whole.model.generation_config.to_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_cast_as_in_memory(
    dtype: str, windows: torch.Tensor, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", dtype=torch.bfloat16)
    assert_equal(
        collect(streamed(folder, dtype=dtype), windows),
        collect(open_model(folder, dtype=dtype), windows),
    )


def test_one_block_at_a_time_has_its_weights_and_they_are_the_checkpoints(tmp_path: Path) -> None:
    opened = streamed(saved(tmp_path / "m", shards=True))
    dense = make_tiny().state_dict()
    with opened.blocks.turns() as turns:
        for number, block in turns:
            assert len(resident(opened.model)) == len(list(block.parameters())) == 9
            for name, value in block.state_dict().items():
                assert torch.equal(value, dense[f"model.layers.{number}.{name}"])
    assert not resident(opened.model)


def test_a_turn_cut_short_by_an_error_leaves_no_weights(tmp_path: Path) -> None:
    opened = streamed(saved(tmp_path / "m"))

    def interrupted() -> None:
        with opened.blocks.turns() as turns:
            next(turns)
            assert resident(opened.model)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not resident(opened.model)


def test_weights_outside_of_the_blocks_wait_on_the_host(tmp_path: Path) -> None:
    """Of a model that computes on another device, which "cpu:0" is to PyTorch."""
    opened = open_streamed(saved(tmp_path / "m", tie_word_embeddings=True))
    assert opened is not None
    model, other = opened.model, torch.device("cpu", 0)
    assert not hasattr(model, DEVICE)  # on a CPU they are where they are needed
    setattr(model, DEVICE, other)
    assert model_device(model) == other
    outer = [p for p in model.parameters() if not p.is_meta]
    home = [p.data_ptr() for p in outer]
    assert len(outer) == 2  # tied embeddings, norm

    def embedded() -> torch.Tensor:
        with outer_weights(model):
            assert not {p.data_ptr() for p in outer} & set(home)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            return model.model.embed_tokens(torch.arange(3))

    assert torch.equal(embedded(), outer[0][:3])
    assert [p.data_ptr() for p in outer] == home
    with pytest.raises(RuntimeError, match="fails"), outer_weights(model):
        raise RuntimeError("fails")
    assert [p.data_ptr() for p in outer] == home


def test_a_shard_that_vanishes_is_named_at_its_block(tmp_path: Path, windows: torch.Tensor) -> None:
    opened = streamed(saved(tmp_path / "m"))
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(CfspError, match=r"cannot read .*model\.safetensors"):
        collect(opened, windows)


def test_part_weights_are_read_alone(tmp_path: Path) -> None:
    opened = streamed(saved(tmp_path / "m", shards=True), dtype="bfloat16")
    assert isinstance(opened.blocks, StoredBlocks)
    (found,) = opened.blocks.part_weights(2)
    mlp = make_tiny().to(torch.bfloat16).model.layers[2].mlp
    for kind in ("gate", "up", "down"):
        assert torch.equal(getattr(found, kind), getattr(mlp, f"{kind}_proj").weight)
    assert not resident(opened.model)


def rewrite(folder: Path, change: object) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_as_whole(folder: Path, out: Path) -> None:
    """Pruned from disk to disk gives what transformers loads whole gives."""
    whole = open_model(folder)
    prune(folder, out / "streamed")
    prune(whole.model, out / "whole", tokenizer=whole.tokenizer)
    assert_same_files(out / "streamed", out / "whole")


def test_tensors_of_other_names_and_types_are_streamed_as_transformers_loads_them(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path / "m")
    rewrite(folder, lambda t: t.update(more=torch.zeros(1)))
    with pytest.raises(CfspError, match=r"LlamaForCausalLM has no place for more$"):
        open_streamed(folder)
    rewrite(folder, lambda t: t.pop("more"))
    rewrite(
        folder,
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": t["lm_head.weight"][0].clone()}
        ),
    )
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].double()}))
    assert_as_whole(folder, tmp_path / "doubles")
    names = dict(read_header(folder / "model.safetensors"))
    rewrite(folder, lambda t: [t.update({k.removeprefix("model."): t.pop(k)}) for k in names])
    assert "layers.0.mlp.up_proj.weight" in read_header(folder / "model.safetensors")
    assert_as_whole(folder, tmp_path / "bare")


def test_a_tied_head_that_is_stored_too_is_tied_where_it_is_the_same(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", tie_word_embeddings=True)
    prune(folder, tmp_path / "a")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert prune(folder, tmp_path / "b").live is None
    assert_same_files(tmp_path / "a", tmp_path / "b")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert_as_whole(folder, tmp_path / "other")
    kept = read_header(tmp_path / "other" / "streamed" / "model.safetensors")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= kept.keys()
    rewrite(folder, lambda t: t.pop("model.embed_tokens.weight"))
    assert_as_whole(folder, tmp_path / "head alone")


def test_missing_tensors_and_wrong_shapes_are_refused_without_reading(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(8)}))
    with pytest.raises(CfspError, match=r"model\.norm\.weight is \[8\] in the weights, \[32\] by"):
        open_streamed(folder)
    rewrite(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CfspError, match=r"missing keys in the weights: model\.norm\.weight"):
        open_streamed(folder)


def test_a_hub_id_is_its_local_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m")

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        if name != "someone/tiny":
            raise FileNotFoundError(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert streamed("someone/tiny").name == "someone/tiny"
    with pytest.raises(CfspError, match=r"no folder someone/absent here, and cannot load it from"):
        open_streamed("someone/absent")


RECIPE = cfsp.Recipe(
    scorer="cfsp",
    sparsity=0.3,
    width_multiple=1,
    calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=32),
)


def prune(model: object, out: Path, recipe: cfsp.Recipe = RECIPE, **options: object) -> object:
    given = {"eval_windows": 0, "eval_dataset": TEXT, "progress": False, **options}
    return cfsp.prune(model, recipe=recipe, out=out, **given)


def assert_same_files(a: Path, b: Path) -> None:
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Prune by path with the whole model in memory."""

    def run(*arguments: object, **options: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr("cfsp.models.opening.open_streamed", lambda *_, **__: None)
            return prune(*arguments, **options)

    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scorer", ["cfsp", "wanda-sp", "flap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_is_that_of_the_model_in_memory_byte_for_byte(
    family: str,
    scorer: str,
    dtype: torch.dtype,
    tmp_path: Path,
    whole: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (checkpoint, second_pass):
        monkeypatch.setattr(module, "MAX_SHARD_BYTES", 30_000)
    folder = saved(tmp_path / "m", family, True, dtype=dtype, tie_word_embeddings=scorer == "flap")
    recipe = replace(RECIPE, scorer=scorer)
    result = prune(folder, tmp_path / "streamed", recipe)
    assert result.live is None
    assert whole(folder, tmp_path / "whole", recipe).live is not None
    assert_same_files(tmp_path / "streamed", tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    assert len(set(result.plan.widths)) > 1


def test_any_sharding_of_the_source_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, shards in (("one", False), ("many", True)):
        prune(saved(tmp_path / name / "m", shards=shards), tmp_path / f"{name}-out")
    assert_same_files(tmp_path / "one-out", tmp_path / "many-out")


def test_a_pruned_folder_and_biased_projections_stream_too(
    tmp_path: Path, whole: Callable[..., object]
) -> None:
    folder = saved(tmp_path / "m", mlp_bias=True)
    flap = replace(RECIPE, scorer="flap")
    prune(folder, tmp_path / "once", flap)
    whole(folder, tmp_path / "once-whole", flap)
    assert_same_files(tmp_path / "once", tmp_path / "once-whole")
    folder = saved(tmp_path / "plain" / "m")
    prune(folder, tmp_path / "a", flap)
    assert prune(tmp_path / "a", tmp_path / "b", RECIPE).live is None
    whole(tmp_path / "a", tmp_path / "b-whole", RECIPE)
    assert_same_files(tmp_path / "b", tmp_path / "b-whole")


def test_one_width_for_all_streams_to_the_stock_architecture(
    tmp_path: Path, whole: Callable[..., object]
) -> None:
    folder = saved(tmp_path / "m")
    recipe = replace(RECIPE, allocator="uniform", sparsity=0.25)
    assert prune(folder, tmp_path / "a", recipe).report.stock
    whole(folder, tmp_path / "b", recipe)
    assert_same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_is_that_of_the_model_in_memory(
    family: str, dtype: torch.dtype, tmp_path: Path, whole: Callable[..., object]
) -> None:
    folder = saved(tmp_path / "m", family, dtype=dtype)
    pair = [
        run(folder, tmp_path / name, eval_windows=3).report
        for run, name in ((prune, "a"), (whole, "b"))
    ]
    for when in ("perplexity_before", "perplexity_after"):
        found, expected = (replace(getattr(report, when), seconds=0) for report in pair)
        assert found == expected
    assert pair[0].perplexity_before.perplexity != pair[0].perplexity_after.perplexity
    assert pair[0].perplexity_before.seconds > 0


def test_the_model_of_a_streamed_result_is_loaded_when_asked_for(tmp_path: Path) -> None:
    result = prune(saved(tmp_path / "m"), tmp_path / "out")
    assert "model" not in vars(result)
    assert type(result.model).__name__ == "CFSPLlamaForCausalLM"
    assert result.model is result.model
    assert sum(p.numel() for p in result.model.parameters()) == result.report.parameters_after


def test_a_flipped_byte_in_what_was_written_is_a_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupted(folder: Path, *arguments: object) -> None:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[read_header(file)["model.layers.1.mlp.up_proj.weight"].start + 2] ^= 0x40
        file.write_bytes(content)
        write(folder, *arguments)

    write = disk_to_disk.write_documents
    monkeypatch.setattr(disk_to_disk, "write_documents", corrupted)
    with pytest.raises(RuntimeError, match="differs from the pruned one by"):
        prune(saved(tmp_path / "m"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


MEMORY = """
import sys, torch
torch.set_num_threads(1)
import cfsp
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.models.test_streaming import prune
def peak():  # of this process image: getrusage would carry the parent's over
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
small, large, out = (Path(argument) for argument in sys.argv[1:])
for name in ("first", "again"):  # warm up
    prune(small, out / name, eval_windows=2)
before = peak()
prune(large, out / "large", eval_windows=2)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    """5 and 30 blocks of 7.25 MiB: 181 MiB more of weights, at most a few blocks more of memory.

    A few, because how many of reading, cutting and writing meet at the peak is a matter of luck.
    """
    shape = {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 64}
    small, large = (
        saved(tmp_path / str(count) / "m", num_hidden_layers=count, **shape) for count in (5, 30)
    )
    root = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, "-c", MEMORY.format(root=root), small, large, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert float(run.stdout) < 6 * 7.25
