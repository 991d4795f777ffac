"""Where a run computes: kept with every checkpoint and the final model, for whoever reads about the run elsewhere."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from chronicals import __version__

_LIBRARIES = ("transformers", "tokenizers", "datasets")


def environment(device: torch.device) -> dict[str, str]:
    """Name -> value, as the report shows them: device, system, versions of what computes."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads",
        **({"CUDA": torch.version.cuda} if gpu and torch.version.cuda else {}),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": platform.python_version(),
        "chronicals": __version__,
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in _LIBRARIES},
    }
