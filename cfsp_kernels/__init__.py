"""Per-channel statistics, scores and compaction for structured pruning of FFNs.

Usable on its own: it needs torch, and knows tensors only.
"""

from .block_influence import BlockInfluence, block_influence
from .channel_importance import channel_importance
from .channel_statistics import ChannelStatistics, channel_statistics
from .gather import gather_columns, gather_rows
from .gram import gram
from .swiglu_statistics import swiglu_statistics

__all__ = [
    "BlockInfluence",
    "ChannelStatistics",
    "block_influence",
    "channel_importance",
    "channel_statistics",
    "gather_columns",
    "gather_rows",
    "gram",
    "swiglu_statistics",
]
