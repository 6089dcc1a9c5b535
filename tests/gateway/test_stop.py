"""A stop reaches every worker, also those that are just being made."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import pytest

from tests.gateway.served import serving

# A stop that waits for so long that a busy machine cannot be taken for a worker that missed it.
STOP_S = 120
_PATIENT = f"import gateway.wsgi as w; w.STOP_TIMEOUT_S = {STOP_S}; import cas.cli; cas.cli.main()"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_while_it_forks_ends_at_once(
    disk_folder: Path, stop: signal.Signals
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), program=("-c", _PATIENT), GATEWAY__WORKERS="8") as server,
    ):
        server.process.send_signal(stop)
        # A worker that missed the signal would be waited for until it is killed.
        assert server.process.wait(timeout=STOP_S - 30) == 0
