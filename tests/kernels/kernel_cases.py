"""Tensors and bounds that the kernel tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings

UNIT = 2.0**-24
"""Unit roundoff of fp32."""
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDOFF)
# Few, as the interpreter takes milliseconds per program, and the same ones on every run.
few_examples = settings(
    deadline=None,
    derandomize=True,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def random_matrix(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    padding: int = 0,
    seed: int = 0,
) -> torch.Tensor:
    """Normal entries; ``padding`` NaN columns between a row and the next, which no op may read."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.full((rows, columns + padding), float("nan"))
    matrix[:, :columns] = torch.randn(rows, columns, generator=generator)
    return matrix.to(device, dtype)[:, :columns]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaNs too."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(integer), b.contiguous().view(integer)
    )


def off_by(exact: torch.Tensor, ulps: int) -> torch.Tensor:
    """fp64 rounded to fp32, and then larger in magnitude by ``ulps``: how hardware may err."""
    rounded = exact.float()
    moved = (rounded.view(torch.int32) + ulps).view(torch.float32)
    return torch.where(rounded.isfinite() & (rounded != 0), moved, rounded)


def gram_dtype(form: str, device: torch.device) -> torch.dtype:
    """The dtype to try a form of gram with; skips the test where it cannot run."""
    if form == "tma" and device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor memory accelerator before sm_90")
    if form == "tma" and torch.version.hip:
        pytest.skip("a tensor memory accelerator is NVIDIA's")
    if form == "panels" and device.type == "cpu":
        return torch.float32  # torch has no fp32 products of 16-bit factors on a CPU
    return torch.bfloat16
