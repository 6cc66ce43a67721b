"""What calibration costs on top of the plain forward pass over the same tokens.

Each round times the plain forward of all blocks and then the calibration, so that both see the
same machine; ``extra_info["overhead"]`` is the median of the rounds' ratios, less one.
"""

import statistics

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.environment import describe
from benchmarks.common.harness import INTERPRETED
from benchmarks.common.timing import DEVICE, ON_GPU, ColdCache, seconds_of

ROUNDS = 11
CPU_SHAPE = {  # SmolLM2-135M, six of its thirty blocks
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
REHEARSED_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPU_SHAPE = {  # Llama-3-8B, four of its thirty-two blocks
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@torch.no_grad()
def test_statistics_and_influence_on_top_of_the_plain_forward(
    benchmark: BenchmarkFixture,
) -> None:
    from cfsp.calibration.collect import collect_statistics
    from cfsp.models.blockwise import default_micro_batch
    from cfsp.models.layouts import LAYOUTS

    torch.manual_seed(0)
    shape, windows, seqlen = CPU_SHAPE, 4, 1024
    if ON_GPU:
        shape, windows, seqlen = GPU_SHAPE, 32, 1024
    elif INTERPRETED:
        shape, windows, seqlen = REHEARSED_SHAPE, 2, 16
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=1024, **shape)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    model = LlamaForCausalLM(config).to(DEVICE, dtype).eval()
    windows = torch.randint(0, 1024, (windows, seqlen))
    micro_batch = default_micro_batch(torch.device(DEVICE), seqlen)
    cold_cache = ColdCache()
    plain: list[float] = []
    calibrated: list[float] = []

    def forward() -> None:
        for tokens in windows.split(micro_batch):
            model.base_model(input_ids=tokens.to(DEVICE), use_cache=False)

    def calibrate() -> None:
        collect_statistics(
            model, LAYOUTS["llama"], windows, micro_batch=micro_batch, progress=False
        )

    def both() -> None:
        plain.append(seconds_of(forward, cold_cache))
        calibrated.append(seconds_of(calibrate, cold_cache))

    benchmark.pedantic(both, rounds=ROUNDS, warmup_rounds=1)
    plain, calibrated = plain[1:], calibrated[1:]
    benchmark.extra_info.update(
        plain_forward_seconds=statistics.median(plain),
        calibration_seconds=statistics.median(calibrated),
        overhead=statistics.median(c / p for c, p in zip(calibrated, plain, strict=True)) - 1,
        environment=describe(),
    )
