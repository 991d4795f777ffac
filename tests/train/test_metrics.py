from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from chronicals.data.batch import PackedBatch
from chronicals.data.documents import Documents
from chronicals.data.loader import Loader
from chronicals.train import metrics
from chronicals.train.metrics import Meter, MetricsFile, peak_memory

CPU = torch.device("cpu")


def window(tokens: int) -> list[PackedBatch]:
    """One bin of 64 with a document of `tokens`."""
    documents = Documents.from_lists([([1] * tokens, [False] + [True] * (tokens - 1))])
    return Loader(documents, sequence_len=64, micro_batch_size=1).window(0)


def test_rows_are_on_disk_as_soon_as_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write({"step": 1})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'
    length = file.sync()
    file.write({"step": 2})
    file.close()
    assert length == len('{"step": 1}\n')
    again = MetricsFile(tmp_path / "m.jsonl", keep_bytes=length)
    again.write({"step": 2, "again": True})
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2, "again": True}]


def test_only_real_tokens_and_training_time_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    meter = Meter(CPU)
    meter.add(window(40))
    now[0] += 1.0
    with meter.paused():
        now[0] += 100.0
    meter.add(window(20))
    now[0] += 1.0
    row = meter.read(meter.mark())
    assert (row["tokens_per_second"], row["step_ms"]) == (30.0, 1000.0), "60 tokens of 128 slots, in 2 s and 2 steps"
    meter.add(window(10))
    now[0] += 0.5
    assert meter.read(meter.mark())["tokens_per_second"] == 20.0


def test_peak_memory_on_the_cpu_is_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_memory(CPU) > 50 << 20
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=3000))
    monkeypatch.setattr(metrics.sys, "platform", "linux")
    assert peak_memory(CPU) == 3000 * 1024
    monkeypatch.setattr(metrics.sys, "platform", "darwin")
    assert peak_memory(CPU) == 3000
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5000))
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(metrics.sys, "platform", "win32")
    assert peak_memory(CPU) == 5000
