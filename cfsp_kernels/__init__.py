"""Per-channel statistics, scores and compaction for structured pruning of FFNs.

Usable on its own: it needs torch, knows tensors only, and runs its Triton kernels where Triton
is installed and the tensors are on a GPU.
"""

from .accumulator import ChannelAccumulator
from .block_influence import BlockInfluence, block_influence
from .channel_importance import channel_importance
from .channel_statistics import ChannelStatistics, channel_statistics
from .gather import CompactFFN, gather_columns, gather_ffn, gather_rows
from .gram import gram
from .swiglu_statistics import swiglu_statistics

__all__ = [
    "BlockInfluence",
    "ChannelAccumulator",
    "ChannelStatistics",
    "CompactFFN",
    "block_influence",
    "channel_importance",
    "channel_statistics",
    "gather_columns",
    "gather_ffn",
    "gather_rows",
    "gram",
    "swiglu_statistics",
]
