# SPDX-License-Identifier: Apache-2.0
"""Config of a decoder whose blocks differ, in the format of ``nemotron-nas``.

Self-contained: this file lies beside the weights. Runtimes read the blocks' settings as attributes.
"""

from types import SimpleNamespace

from transformers import LlamaConfig


class BlockConfig(SimpleNamespace):
    def to_dict(self):
        return {k: v.to_dict() if isinstance(v, BlockConfig) else v for k, v in vars(self).items()}


def block_config(values):
    if not isinstance(values, dict):
        return values
    return BlockConfig(**{name: block_config(value) for name, value in values.items()})


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [block_config(block) for block in block_configs or []]

    def to_dict(self):
        return {**super().to_dict(), "block_configs": [b.to_dict() for b in self.block_configs]}
