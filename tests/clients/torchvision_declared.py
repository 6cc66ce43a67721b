"""Has torchvision be imported where its compiled operators are those of another build of torch.

vLLM's code of images imports it, and it asks for these two to be declared. Put into a client's
environment, where a .pth file imports it whenever Python starts.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
