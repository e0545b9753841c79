"""Fail where a package that does not load beside the CPU build of torch, or gigabytes of CUDA, came along."""

import sys
from importlib import metadata

import torch

names = {(distribution.name or "").lower() for distribution in metadata.distributions()}
found = sorted(
    name
    for name in names
    if name in ("torchvision", "torchaudio", "torchcodec") or name.startswith("nvidia-")
)
if torch.version.cuda or torch.version.hip:
    print(f"torch {torch.__version__} is a GPU build, which brings its own packages: not checked")
elif found:
    sys.exit(f"installed, and must not be: {', '.join(found)}")
else:
    print(f"torch {torch.__version__}: no torchvision, torchaudio, torchcodec or nvidia package")
