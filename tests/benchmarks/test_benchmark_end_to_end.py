"""The end-to-end run measures what the package did, and says so where it could not run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cfsp
from benchmarks import end_to_end


def install(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Stand-ins for the package's functions that keep ``width`` of 256 channels."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    def prune(model: str, *, recipe: Any, out: str) -> None:
        assert recipe.sparsity == 0.3
        assert Path(recipe.dataset).stat().st_size > recipe.samples * recipe.seqlen
        config = LlamaConfig.from_pretrained(model)
        config.intermediate_size = width
        LlamaForCausalLM(config).save_pretrained(out)

    monkeypatch.setattr(cfsp, "Recipe", SimpleNamespace, raising=False)
    monkeypatch.setattr(cfsp, "prune", prune, raising=False)
    monkeypatch.setattr(cfsp, "load", AutoModelForCausalLM.from_pretrained, raising=False)


def arguments(folder: Path) -> list[str]:
    return ["--work", str(folder / "work"), "--json", str(folder / "result.json")]


def test_seconds_sizes_and_widths_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, width=179)
    assert end_to_end.main(arguments(tmp_path)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["run"]
    assert result["kept_fraction"] == 179 / 256
    assert result["dense_ffn_parameters"] == 2 * 3 * 64 * 256
    assert 0 < result["pruned_bytes"] < result["dense_bytes"]
    for name in ("write_seconds", "prune_seconds", "dense_forward_seconds", "forward_speedup"):
        assert result[name] > 0
    assert not (tmp_path / "work").exists()


def test_a_width_that_was_not_asked_for_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, width=256)
    with pytest.raises(ValueError, match=r"kept 1\.000"):
        end_to_end.main(arguments(tmp_path))
    assert not json.loads((tmp_path / "result.json").read_text())["run"]


def test_a_missing_function_is_reported_as_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, width=179)
    monkeypatch.delattr(cfsp, "prune")
    monkeypatch.setattr(cfsp, "__getattr__", _no_attribute, raising=False)
    assert end_to_end.main(arguments(tmp_path)) == end_to_end.NOT_RUN
    result = json.loads((tmp_path / "result.json").read_text())
    assert not result["run"]
    assert "prune" in result["reason"]
    assert "not run" in capsys.readouterr().err


def _no_attribute(name: str) -> Any:
    raise AttributeError(name)


def test_a_folder_with_files_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "precious").write_text("x")
    with pytest.raises(SystemExit) as stopped:
        end_to_end.main(arguments(tmp_path))
    assert stopped.value.code == 2
    assert (tmp_path / "work" / "precious").exists()


def test_bytes_become_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    end_to_end.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "words and é"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
