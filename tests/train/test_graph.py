"""What of recorded steps needs no GPU; the rest is in tests/gpu/test_graph_gpu.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chronicals.errors import UserError
from chronicals.kernels.attention import PerDocument, TorchVarlen
from chronicals.kernels.ops import REFERENCE
from chronicals.train.graph import GraphedStep, refusal, step_class
from chronicals.train.step import Step
from tests.train import helpers

GPU, CPU = torch.device("cuda"), torch.device("cpu")
RECORDABLE = replace(REFERENCE, attention=TorchVarlen())


def test_a_gpu_records_by_default() -> None:
    notes: list[str] = []
    assert step_class("auto", GPU, RECORDABLE, notes) is GraphedStep
    assert step_class(True, GPU, RECORDABLE, notes) is GraphedStep
    assert step_class(False, GPU, RECORDABLE, notes) is Step
    assert notes == []


@pytest.mark.parametrize("ops", [REFERENCE, replace(REFERENCE, attention=PerDocument())], ids=["by device", "document"])
def test_auto_says_why_not(ops: object) -> None:
    notes: list[str] = []
    assert step_class("auto", GPU, ops, notes) is Step
    assert notes == [
        "cuda_graph: off, as attention runs document by document, which asks the host for their boundaries"
    ]


def test_a_cpu_needs_no_note() -> None:
    notes: list[str] = []
    assert step_class("auto", CPU, RECORDABLE, notes) is Step
    assert (notes, refusal(CPU, RECORDABLE)) == ([], "there is no GPU")


def test_what_cannot_be_had_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="cuda_graph: true, but there is no GPU; set cuda_graph: auto"):
        helpers.run(helpers.make_config(folder, cuda_graph=True))
