"""Checkpoints that nobody made for us: refused in one line, before a value of them is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

import cfsp
from cfsp.errors import CfspError
from cfsp.models.loading import make_skeleton
from cfsp.models.opening import adopt, open_any, open_streamed

from ..conftest import TEXT, TINY, make_tiny, make_tokenizer

RECIPE = cfsp.Recipe(
    scorer="cfsp",
    width_multiple=8,
    calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=16),
)
OPTIONS = {"recipe": RECIPE, "eval_windows": 0, "progress": False}


def saved(folder: Path, family: str = "llama", **config: object) -> Path:
    make_tiny(family, **config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a checkpoint may be read."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("a value was read")

    monkeypatch.setattr("cfsp.models.opening.read_tensors", read)
    monkeypatch.setattr("cfsp.models.opening.load_weights", read)


def check_refused(folder: Path, message: str) -> None:
    """By a run, in memory too, and by its estimate, all before the result has a folder."""
    for attempt in (
        lambda: cfsp.prune(folder, out=folder.with_name("out"), **OPTIONS),
        lambda: cfsp.open_model(folder),
        lambda: cfsp.estimate(folder, RECIPE),
    ):
        with pytest.raises(CfspError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
    assert not folder.with_name("out").exists()


SCHEMES: dict[str, dict[str, object]] = {
    "gptq": {"bits": 4, "group_size": 32},
    "awq": {"bits": 4, "zero_point": True},
    "bitsandbytes": {"load_in_8bit": True},
    "torchao": {"quant_type": "int4_weight_only"},
    "of tomorrow": {},
}
READ: dict[str, dict[str, object]] = {
    "fp8": {"weight_block_size": [128, 128]},
    "mxfp4": {"modules_to_not_convert": []},
    "modelopt": {"quant_algo": "NVFP4"},
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("method", SCHEMES)
def test_a_quantised_checkpoint_is_refused_by_its_config(method: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit(folder, quantization_config={"quant_method": method, **SCHEMES[method]})
    check_refused(folder, rf"m is quantised \({method}\); only plain float weights, GGUF files and")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("method", READ)
def test_plain_weights_that_are_said_to_be_quantised_are_refused(
    method: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m")
    edit(folder, quantization_config={"quant_method": method, **READ[method]})
    check_refused(folder, rf"m has plain weights, and says that it is quantised \({method}\)")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("value", [{}, {"bits": 4}, [], "int8"])
def test_a_scheme_without_a_name_is_refused_too(value: object, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit(folder, compression_config=value)
    check_refused(folder, r"m is quantised \(of unknown method\)")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_file_of_a_quantiser_is_enough(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / name).write_text("{}")
    check_refused(folder, f"m is quantised, it has {name}")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"is quantised \(of unknown method\)"),
        ('{"quantization": {"quant_algo": "W4A8"}}', r"is quantised \(modelopt"),
        ('{"quantization": {"quant_algo": "NVFP4"}}', r"says that it is quantised \(modelopt\)"),
    ],
)
def test_the_file_of_modelopt_is_a_config_of_its_own(
    text: str, message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m")
    (folder / "hf_quant_config.json").write_text(text)
    check_refused(folder, message)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32"])
@pytest.mark.parametrize(
    "name", [Q, "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_weights_that_are_no_plain_floats_are_refused_by_their_headers(
    name: str, dtype: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m")
    rewrite(folder, lambda t: t.update({name: t[name].to(getattr(torch, dtype))}))
    check_refused(folder, rf"m is quantised: {name} is stored as {dtype}")


def test_buffers_that_a_model_makes_itself_may_be_stored(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    rewrite(
        folder,
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
                "model.position_ids": torch.arange(8)[None],
            }
        ),
    )
    assert open_streamed(folder) is not None


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.mlp.up_proj.bias"),
        ("llama", "model.layers.4.input_layernorm.weight"),
        ("llama", f"{Q}_scale"),
        ("llama", "model.vision_tower.patch_embedding.weight"),
        ("qwen2", "model.mtp.fc.weight"),
        ("gpt2", "transformer.h.4.ln_1.weight"),
        ("gpt_neox", "gpt_neox.layers.9.mlp.dense_h_to_4h.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w4.weight"),
    ],
)
def test_a_tensor_without_a_place_in_the_model_is_refused(
    family: str, name: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", family)
    rewrite(folder, lambda t: t.update({name: torch.ones(4, 4)}))
    check_refused(folder, rf"do not belong together: \w+ has no place for .*{name.split('.')[-2]}")


def test_an_expert_too_many_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "mixtral", num_local_experts=4)
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    rewrite(folder, lambda t: t.update({name.format(4): t[name.format(3)].clone()}))
    with pytest.raises(CfspError, match=r"mismatched keys in the weights|cannot load"):
        open_any(folder)


def test_what_the_family_leaves_out_on_purpose_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = saved(tmp_path / "m"), "model.mtp.0.weight"
    rewrite(folder, lambda t: t.update({name: torch.ones(2, 2)}))
    left_out = "transformers.LlamaForCausalLM._keys_to_ignore_on_load_unexpected"
    monkeypatch.setattr(left_out, [r"\.mtp\."], raising=False)
    with pytest.warns(UserWarning, match=rf"{name} of .* is left out of the result"):
        assert open_streamed(folder) is not None


@pytest.mark.usefixtures("unread")
def test_an_adapter_in_the_folder_is_refused_whatever_it_adapts(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"]}))
    check_refused(folder, r"m has an adapter, adapter_config\.json: merge it")


PARTS = {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("qwen2_audio", "it is multimodal, and no model of images and text"),
        ("voxtral", "it is multimodal, and no model of images and text"),
        ("qwen2_5_omni", "it is multimodal, and no model of images and text"),
        ("chameleon", "it is multimodal, with no text decoder of its own"),
        ("musicgen", "it is made of several models"),
        ("florence2", "an encoder-decoder"),
        ("t5", "an encoder-decoder"),
    ],
)
def test_what_is_neither_a_decoder_nor_one_beside_vision_is_refused(
    kind: str, reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    parts = {name: {"model_type": part} for name, part in PARTS.items() if kind == "musicgen"}
    AutoConfig.for_model(kind, **parts).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"never looked at")
    check_refused(folder, f"unsupported architecture '{kind}': {reason}")


ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "attn_layer_period": 2, "head_dim": None}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("gemma3n_text", {"hidden_size_per_layer_input": 8, "laurel_rank": 8}, "one by one"),
        ("llama", {"per_layer_config": {0: {"intermediate_size": 32}}}, "sizes of their own"),
        ("exaone", {}, "they are those of llama, with other names"),
        ("bitnet", {}, "mlp of BitNetDecoderLayer does not compute"),
        ("zamba", ZAMBA, "shared_transf.feed_forward of ZambaHybridLayer is only one part"),
    ],
)
def test_families_that_cannot_be_pruned_yet_are_refused_before_any_work(
    kind: str, config: dict[str, object], reason: str, tmp_path: Path
) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    folder = tmp_path / "m"
    values = {**TINY, **config}
    if kind == "gemma3n_text":
        values |= {"intermediate_size": [48] * 4, "num_kv_shared_layers": 0, "layer_types": None}
        values |= {"vocab_size_per_layer_input": 260}
    AutoConfig.for_model(kind, **values).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    with pytest.raises(CfspError, match=f"unsupported architecture '{kind}': .*{reason}") as error:
        open_any(folder)
    assert "\n" not in str(error.value)
    if "per_layer_config" not in config:
        assert reason in cfsp.estimate(folder / "config.json", RECIPE).refusal


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}},
        {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel:forward"},
        {"experts_implementation": "someone/experts"},
    ],
)
def test_no_code_that_a_folder_names_is_run(changes: dict[str, object], tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit(folder, **changes)
    check_refused(folder, "code of its own|code from the hub|model type `mine`")


@pytest.mark.parametrize(
    "name", ["more.safetensors", "model.safetensors", "config.json", "tokenizer.json", "notes.txt"]
)
def test_a_pipe_in_the_folder_hangs_nobody(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CfspError, match=f"{name}: it is a FIFO|no config"):
        open_any(folder)


def test_documents_are_bounded(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(CfspError, match=r"tokenizer\.json has more than 1\.0 GiB"):
        open_any(folder)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CfspError, match=r"no safetensors weights.*only pytorch_model\.bin"):
        open_any(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"tokenizer_class": 5}'),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
        ("generation_config.json", b"nothing"),
    ],
)
def test_a_broken_document_is_one_line(file: str, content: bytes, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / file).write_bytes(content)
    with pytest.raises(CfspError) as error:
        open_any(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "has no place for|has no blocks"),
        ({"hidden_size": 33}, "no causal LM of it|cannot load"),
        ({"hidden_act": "unheard"}, "no causal LM of it: 'unheard'"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_line(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m")
    edit(folder, **changes)
    with pytest.raises(CfspError, match=message):
        open_any(folder)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_no_text_may_meet_is_found_at_once(
    name: str, value: float, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    rewrite(folder, spoil)
    for whole in (False, True):
        with pytest.raises(CfspError, match=rf"m: {name} holds NaN or infinite values"):
            open_any(folder, whole=whole)


class TestLiveModules:
    """Live modules are pruned, or refused before the calibration."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize(
        ("family", "recipe"),
        [
            ("llama", {}),
            ("llama", {"scorer": "obs"}),
            ("llama", {"compensation": "blockwise"}),
            ("phi3", {"scorer": "cfsp"}),
            ("mixtral", {}),
        ],
    )
    def test_the_default_dtype_changes_nothing(
        self, family: str, recipe: dict[str, object], dtype: torch.dtype
    ) -> None:
        def pruned() -> PreTrainedModel:
            calibration = cfsp.Calibration(dataset=TEXT, samples=4, seqlen=32)
            wanted = cfsp.Recipe(width_multiple=8, calibration=calibration, **recipe)
            return cfsp.prune(
                make_tiny(family).float(), make_tokenizer(), wanted, progress=False
            ).model

        expected = pruned().state_dict()
        model = make_tiny(family)
        torch.set_default_dtype(dtype)
        try:
            calibration = cfsp.Calibration(dataset=TEXT, samples=4, seqlen=32)
            wanted = cfsp.Recipe(width_multiple=8, calibration=calibration, **recipe)
            found = cfsp.prune(model, make_tokenizer(), wanted, progress=False).model.state_dict()
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("target", ["q_proj", "up_proj", "down_proj"])
    def test_adapters_inside_are_refused(self, target: str) -> None:
        peft = pytest.importorskip("peft")
        model = make_tiny()
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[target]), model)
        with pytest.raises(CfspError, match=rf"{target}.* is an adapter's: merge it before"):
            cfsp.calibrate(model, make_tokenizer(), RECIPE, progress=False)
        wrapped = peft.get_peft_model(make_tiny(), peft.LoraConfig(target_modules=[target]))
        with pytest.raises(CfspError, match="got PeftModel: merge its adapters first"):
            cfsp.calibrate(wrapped, make_tokenizer(), RECIPE, progress=False)

    @pytest.mark.parametrize("part", ["model.layers.1", "lm_head", "model.embed_tokens"])
    def test_weights_that_are_elsewhere_are_refused(self, part: str) -> None:
        model = make_tiny()
        model.get_submodule(part).to_empty(device="meta")
        with pytest.raises(CfspError, match=rf"{part}.* has no values here, it is offloaded"):
            cfsp.prune(model, make_tokenizer(), RECIPE, progress=False)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
    def test_quantised_parameters_are_refused(self, dtype: torch.dtype) -> None:
        model = make_tiny()
        attention = model.model.layers[2].self_attn
        weight = attention.k_proj.weight.detach().to(dtype)
        attention.k_proj.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(CfspError, match=r"2\.self_attn\.k_proj\.weight of the live model is"):
            adopt(model, make_tokenizer())


LIVE_REFUSALS: dict[str, tuple[Callable[[PreTrainedModel], object], str]] = {
    "shared FFN": (
        lambda m: setattr(m.model.layers[1], "mlp", m.model.layers[0].mlp),
        r"layers\.1\.mlp\.\w+\.weight is a parameter of another block",
    ),
    "fewer blocks": (
        lambda m: setattr(m.model, "layers", m.model.layers[:2]),
        "its config describes other parameters",
    ),
    "config of fewer blocks": (
        lambda m: setattr(m.config, "num_hidden_layers", 2),
        "its config describes other parameters",
    ),
    "another activation": (
        lambda m: setattr(m.model.layers[3].mlp, "act_fn", nn.Tanh()),
        "a new model of its config and weights says something else",
    ),
    "a hook": (
        lambda m: m.model.layers[0].mlp.register_forward_hook(lambda *args: args[-1] * 2),
        "a new model of its config and weights says something else",
    ),
    "NaN in the head": (
        lambda m: m.lm_head.weight.data[3].fill_(float("nan")),
        r"lm_head\.weight holds NaN",
    ),
    "two dtypes": (lambda m: m.lm_head.to(torch.bfloat16), r"lm_head\.weight .* is bfloat16"),
    "a dtype that nothing is cut in": (lambda m: m.double(), "is float64: only fp32, bf16"),
    "buffers on meta": (lambda m: m.model.rotary_emb.to("meta"), "inv_freq .* it is on meta"),
    "a generation config that is none": (
        lambda m: setattr(m.generation_config, "temperature", 0.3),
        "the live model cannot be saved",
    ),
}


@pytest.mark.parametrize("name", LIVE_REFUSALS)
def test_a_live_model_that_could_not_come_back_is_refused_uncut(name: str, tmp_path: Path) -> None:
    change, message = LIVE_REFUSALS[name]
    model = make_tiny()
    change(model)
    shapes = {key: value.shape for key, value in model.named_parameters()}
    with pytest.raises(CfspError, match=message):
        cfsp.prune(model, make_tokenizer(), out=tmp_path / "out", **OPTIONS)
    assert {key: value.shape for key, value in model.named_parameters()} == shapes
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_head_and_a_name_for_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CfspError, match="expected a causal LM with its head, got LlamaModel"):
        adopt(make_tiny().model, make_tokenizer())
    with pytest.raises(CfspError, match="tokenizer must be a tokenizer of transformers, got 'x'"):
        cfsp.calibrate(make_tiny(), "x", RECIPE, progress=False)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_a_live_model_with_other_kernels_comes_back(family: str, tmp_path: Path) -> None:
    dense = saved(tmp_path / "m", family)
    model = AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager")
    result = cfsp.prune(model, make_tokenizer(), out=tmp_path / "out", **OPTIONS)
    assert result.model.config._attn_implementation == "eager"
    assert cfsp.load(tmp_path / "out").config.model_type == f"cfsp_{family}"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_two_tensors_for_one_parameter_are_refused(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", family)
    prefix = type(make_tiny(family)).base_model_prefix + "."
    with safe_open(folder / "model.safetensors", "pt") as file:
        name = next(key for key in file.keys() if key.startswith(prefix))  # noqa: SIM118
    rewrite(folder, lambda t: t.update({name.removeprefix(prefix): t[name] + 1}))
    with pytest.raises(CfspError, match=r"m: .* and .* of the weights are one parameter"):
        open_any(folder)


def test_a_model_in_fp64_is_pruned_in_another_dtype(tmp_path: Path) -> None:
    make_tiny().double().save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(CfspError, match="the model is in float64: `dtype='float32'` takes it"):
        open_any(tmp_path / "m")
    assert open_any(tmp_path / "m", dtype="float32").model.dtype == torch.float32


def test_a_tokenizer_given_replaces_one_that_is_absent(tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "NOTICE.txt").symlink_to("nowhere")
    for whole in (False, True):
        opened = open_any(tmp_path / "m", make_tokenizer(), whole=whole)
        assert opened.tokenizer.bos_token == "<bos>"
    (tmp_path / "m").rename(tmp_path / "m.gguf")
    assert open_any(tmp_path / "m.gguf", make_tokenizer()).name == "m.gguf"


class TestFilesThatChange:
    """A run notices when its files are no longer those that it opened."""

    @pytest.mark.parametrize(
        "file", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
    )
    def test_between_the_passes(self, file: str, tmp_path: Path) -> None:
        folder = saved(tmp_path / "m")
        turns = iter(range(100))

        def touch() -> bool:
            if next(turns) == 2:
                shutil.copyfile(folder / file, tmp_path / "copy")
                os.replace(tmp_path / "copy", folder / file)
            return False

        with pytest.raises(CfspError, match=rf"{file} has changed since this run opened it"):
            cfsp.prune(folder, out=tmp_path / "out", stop=touch, **OPTIONS)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: edit(folder, rms_norm_eps=0.1),
            lambda folder: rewrite(folder, lambda t: t["model.norm.weight"].add_(1)),
            lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
        ],
    )
    def test_before_a_resumed_run(self, change: Callable[[Path], object], tmp_path: Path) -> None:
        folder = saved(tmp_path / "m")
        turns = iter(range(100))
        with pytest.raises(cfsp.errors.Stopped):
            cfsp.prune(folder, out=tmp_path / "out", stop=lambda: next(turns) == 1, **OPTIONS)
        change(folder)
        with pytest.raises(CfspError, match="begun with another state of the model's files"):
            cfsp.prune(folder, out=tmp_path / "out", resume=True, **OPTIONS)


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text", "gpt_oss"])
def test_a_skeleton_takes_no_memory_for_experts_of_any_size(kind: str) -> None:
    sizes = {"intermediate_size": 2**17, "moe_intermediate_size": 2**17, "head_dim": 64}
    experts = {"num_experts": 4096, "num_local_experts": 4096}
    config = AutoConfig.for_model(
        kind, hidden_size=2**15, num_hidden_layers=1, num_attention_heads=2, **sizes, **experts
    )
    skeleton = make_skeleton(config, torch.bfloat16)
    assert sum(p.nbytes for p in skeleton.parameters()) > 2**46
    assert all(p.is_meta for p in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
