"""The units that are shipped: systemd finds nothing wrong, and blobcask can run in them."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

DEPLOY = CHECKOUT / "deploy"
UNITS = ("blobcask.service", "blobcask-replicator.service", "blobcask-runner.service")
SOCKET = "blobcask.socket"
DROP_INS = tuple(f"{unit}.d" for unit in UNITS)
PROGRAM = "/opt/blobcask/bin/blobcask"
# What would break the store or its clock, and why it must stay out; see blobcask.service.
FATAL = ("PrivatePIDs", "ProcSubset", "ProtectClock", "DynamicUser")
HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "CapabilityBoundingSet": "",
    "User": "blobcask",
    "LimitNOFILE": "65536",
    "StateDirectory": "blobcask",
}


def service(name: str) -> dict[str, str]:
    """The keys of [Service]; the last of several with one name."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # its documented use
    parser.read_string((DEPLOY / name).read_text())
    return dict(parser["Service"])


def test_systemd_finds_nothing_wrong(program: Callable[[str], str], tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    for name in UNITS:
        # Where this machine has no /opt/blobcask, systemd would only tell that.
        text = (DEPLOY / name).read_text().replace(PROGRAM, sys.executable)
        (tmp_path / name).write_text(text)
    shutil.copy(DEPLOY / SOCKET, tmp_path)
    for folder in DROP_INS:
        shutil.copytree(DEPLOY / folder, tmp_path / folder)
    paths = [str(tmp_path / name) for name in (*UNITS, SOCKET)]
    run = subprocess.run([analyze, "verify", *paths], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_hardened_but_leaves_what_the_store_needs(name: str) -> None:
    keys = service(name)
    assert {key: keys.get(key) for key in HARDENED} == HARDENED
    assert not [key for key in FATAL if key in keys]
    text = (DEPLOY / name).read_text()
    assert "SystemCallFilter=@system-service\nSystemCallFilter=adjtimex\n" in text


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_runs_verbs_that_there_are(name: str) -> None:
    words = service(name)["ExecStart"].split()
    assert words[0] == PROGRAM
    verbs = words[words.index("/etc/blobcask/config.ini") + 1 :]
    run = subprocess.run(
        [sys.executable, "-m", "cas", *verbs, "--help"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_a_reload_is_the_signal_that_replaces_workers() -> None:
    keys = service("blobcask.service")
    assert keys["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert (keys["Type"], keys["KillMode"]) == ("notify", "mixed")
