from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
from chronicals.train.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if signals.received:
            print(signals.received.name, flush=True)
            time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_is_noted_and_the_second_ends_the_process(number: signal.Signals, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    assert process.poll() is None, "still running"
    start = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert time.monotonic() - start < 20
    process.stdout.close()
