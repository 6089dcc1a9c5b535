"""What each number is compared with: the least that any program would have to do."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.ports import free_port
from cas.durable import Disk

_READ_BYTES = 1 << 20
_NGINX_START_S = 10.0


def sha256_of(path: Path) -> str:
    """SHA-256 alone, in reads of a MiB."""
    sha256 = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            sha256.update(data)
    return sha256.hexdigest()


def copy_durably(source: Path, target: Path) -> None:
    """A plain copy (inside the kernel, as `shutil` does it) with fdatasync; no digest."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fdatasync(file.fileno())


def write_durably(data: bytes, target: Path) -> None:
    """One new durable file: write, fdatasync, fsync of its folder. No digest, no record."""
    fd = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, data)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def hashfs_put_all(folder: Path, contents: Iterable[bytes]) -> None:
    """hashfs 0.7.2 in its default form: one `put` after the other, and nothing synced.

    Its temporary files are made under `folder` too, so that it moves them by renaming.
    """
    # Late: it comes with the test requirements, and `blobcask --help` needs none of them.
    import hashfs

    temporary = folder / "temporary"
    temporary.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(temporary)
    try:
        store = hashfs.HashFS(str(folder / "hashfs"))
        for data in contents:
            store.put(io.BytesIO(data))
    finally:
        tempfile.tempdir = before


class SlowDisk(Disk):
    """A disk whose every sync of data takes `delay_s` longer, as a slower one's would."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    def sync_data(self, fd: int) -> None:
        super().sync_data(fd)
        time.sleep(self._delay_s)


@contextmanager
def nginx(folder: Path, files: Path, program: str) -> Iterator[str]:
    """nginx that serves the folder `files` by sendfile; yields its address.

    Its own files are made in `folder`. One worker, as the gateway has beside it.
    """
    port = free_port()
    configuration = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    configuration.write_text(
        f"""
        daemon off; {user} worker_processes 1; pid {folder}/nginx.pid;
        error_log {folder}/error.log;
        events {{ worker_connections 64; }}
        http {{
            access_log off; sendfile on; tcp_nopush on; default_type application/octet-stream;
            client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
            scgi_temp_path {folder}/scgi;
            server {{ listen 127.0.0.1:{port}; root {files}; }}
        }}
        """
    )
    process = subprocess.Popen(
        [program, "-e", f"{folder}/error.log", "-c", str(configuration)],
        stderr=subprocess.DEVNULL,
    )
    try:
        _await_listener(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _await_listener(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(int(_NGINX_START_S / 0.05)):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except ConnectionRefusedError:
            try:
                status = process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"nginx ended with {status}") from None
    raise TimeoutError("nginx does not listen")
