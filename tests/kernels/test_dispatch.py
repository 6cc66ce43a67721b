import os
import subprocess
import sys

import pytest
import torch

import cfsp_kernels
from cfsp_kernels import _dispatch, channel_statistics
from cfsp_kernels._configs import config_for, config_table, launch_config

X = torch.zeros(2, 3)


def run(code: str, **environment: str) -> str:
    """Stdout of ``code`` in a fresh interpreter."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CFSP_BACKEND")
    }
    root = os.path.dirname(os.path.dirname(cfsp_kernels.__file__))
    path = os.pathsep.join([root, *filter(None, [inherited.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if result.returncode:
        raise AssertionError(result.stderr)
    return result.stdout


def test_argument_comes_before_variable_before_device(monkeypatch):
    monkeypatch.setattr(_dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(_dispatch, "interpreted", lambda: True)
    monkeypatch.delenv("CFSP_BACKEND", raising=False)
    assert not _dispatch.use_triton("op", X, None)
    assert _dispatch.use_triton("op", X, "triton")
    monkeypatch.setenv("CFSP_BACKEND", "triton")
    assert _dispatch.use_triton("op", X, None)
    assert not _dispatch.use_triton("op", X, "torch")
    monkeypatch.setenv("CFSP_BACKEND", "")
    assert not _dispatch.use_triton("op", X, None)


def test_unknown_backends_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of torch, triton, got 'cuda'"):
        channel_statistics(X, backend="cuda")
    monkeypatch.setenv("CFSP_BACKEND", "gpu")
    with pytest.raises(ValueError, match="CFSP_BACKEND must be one of"):
        channel_statistics(X)


def test_gpu_tensors_use_triton_where_it_is_installed(monkeypatch):
    class OnGPU:
        is_cuda = True
        device = "cuda:0"

    monkeypatch.delenv("CFSP_BACKEND", raising=False)
    for installed in (True, False):
        monkeypatch.setattr(_dispatch, "triton_installed", lambda installed=installed: installed)
        assert _dispatch.use_triton("op", OnGPU(), None) is installed
    with pytest.raises(RuntimeError, match="not installed"):
        _dispatch.use_triton("op", OnGPU(), "triton")


def test_triton_on_a_cpu_needs_its_interpreter():
    output = run("""
import torch, cfsp_kernels
try:
    cfsp_kernels.channel_statistics(torch.zeros(2, 3), backend="triton")
except RuntimeError as error:
    print(error)
""")
    assert "channel_statistics: backend='triton' needs a tensor on a GPU" in output
    assert "TRITON_INTERPRET=1" in output


def test_without_triton_torch_runs_and_triton_is_an_error():
    output = run("""
import sys
sys.modules["triton"] = None  # importing it fails, as on a system that has none
import torch, cfsp_kernels
print(cfsp_kernels.channel_statistics(torch.ones(4, 2)).sum.tolist())
weight = torch.ones(4, 4)
index = torch.tensor([1])
for op in (
    lambda: cfsp_kernels.channel_statistics(weight, backend="triton"),
    lambda: cfsp_kernels.swiglu_statistics(weight, weight, backend="triton"),
    lambda: cfsp_kernels.block_influence(weight, weight, backend="triton"),
    lambda: cfsp_kernels.channel_importance("magnitude", up=weight, backend="triton"),
    lambda: cfsp_kernels.gram(weight, backend="triton"),
    lambda: cfsp_kernels.gather_rows(weight, index, backend="triton"),
    lambda: cfsp_kernels.gather_columns(weight, index, backend="triton"),
    lambda: cfsp_kernels.gather_ffn(None, weight, weight, index, backend="triton"),
    lambda: cfsp_kernels.ChannelAccumulator(backend="triton").update(weight),
):
    try:
        op()
    except RuntimeError as error:
        print(error)
""")
    lines = output.splitlines()
    assert lines[0] == "[4.0, 4.0]"
    assert len(lines) == 10
    assert all("triton is not installed" in line for line in lines[1:])


def test_importing_and_the_torch_backend_leave_triton_alone():
    output = run("""
import sys, torch, cfsp_kernels
cfsp_kernels.channel_statistics(torch.ones(4, 2))
print([name for name in sys.modules if name.split(".")[0] in ("triton", "transformers")])
""")
    assert output.strip() == "[]"


def test_architectures_without_an_entry_have_the_default():
    assert config_for("gram", "sm_90") == config_table()["gram"]["sm_90"]
    assert config_for("gram", "sm_86") == config_table()["gram"]["default"]
    with pytest.raises(KeyError):
        config_for("softmax", "sm_90")


def test_a_configuration_is_the_callers(device):
    config = launch_config("gram", device)
    config["BLOCK_M"] = 1
    assert launch_config("gram", device)["BLOCK_M"] != 1
