"""Chronicals fine-tunes decoder language models at the limit of the hardware, and proves that they trained.

The public names load on first use, so that `import chronicals` does no work.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["TrainConfig", "Trainer", "__version__", "load_model", "save_model"]

if TYPE_CHECKING:
    from chronicals.config import TrainConfig
    from chronicals.models.hf import load_model, save_model
    from chronicals.train.trainer import Trainer

_HOMES = {
    "TrainConfig": "chronicals.config",
    "Trainer": "chronicals.train.trainer",
    "load_model": "chronicals.models.hf",
    "save_model": "chronicals.models.hf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chronicals' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
