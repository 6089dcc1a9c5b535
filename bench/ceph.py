"""A real S3 server for tests and benchmarks: Ceph's RADOS gateway, whole, on one machine.

One monitor and one OSD that keeps everything in memory, a gateway in front, all on loopback
and without logins among themselves. It is up in about 2 s and holds nothing afterwards. A
manager is left out: it only counts and shows, and costs more processor than the rest.

Debian: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, final

import msgspec

from bench.ports import free_port

PROGRAMS: Final = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
REGION: Final = "default"  # the name of the gateway's zone group
_START_S: Final = 60.0
_STEP_S: Final = 0.02
_COMMAND_S: Final = 60.0

# Why each line that is not plain is there:
# - paxos_*: the monitor gathers changes for a second by default, and each pool is a change
# - ms_mon_*_mode: the gateway insists on encryption to the monitor, which needs a login
# - rgw_gc_*: a deleted object's tail is kept for 2 h by default, here in memory
# - mon_data_avail_*: the test machine's disk may be nearly full
_CONFIGURATION: Final = """
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_mon_service_mode = crc
run_dir = {folder}
admin_socket =
log_file = {folder}/$name.log
keyring = {folder}/keyring
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
mon_data_avail_warn = 1
mon_data_avail_crit = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_objectstore = memstore
memstore_device_bytes = 17179869184
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_class_load_list = *
osd_class_default_list = *
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_gc_obj_min_wait = 2
rgw_gc_processor_period = 2
rgw_gc_processor_max_time = 2
debug_rgw = 0
debug_ms = 0
debug_osd = 0
debug_memstore = 0
"""


@final
class Login(msgspec.Struct, frozen=True):
    """A user of the gateway."""

    name: str
    access_key: str
    secret_key: str


@final
class Ceph:
    """A running one; `address` is its URL, `login` a user who may make buckets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.login = self._start()

    def pid(self, daemon: str) -> int:
        """Of "mon", "osd" or "gateway"."""
        return self._daemons[daemon].pid

    # --- bad luck, as real ones have it

    def stop_gateway(self) -> None:
        """Nothing answers at the address from now on; what is stored stays."""
        gateway = self._daemons.pop("gateway")
        gateway.kill()
        gateway.wait()

    def start_gateway(self) -> None:
        """The gateway is back, and answers, on return."""
        self._run_daemon("gateway", "radosgw", "-f")
        self._await_gateway()

    def revoke(self, login: Login) -> None:
        """The login is refused from now on."""
        self._admin("user", "suspend", "--uid", login.name)

    def allow(self, login: Login) -> None:
        """It is good again."""
        self._admin("user", "enable", "--uid", login.name)

    def make_login(self, name: str) -> Login:
        made = self._admin("user", "create", "--uid", name, "--display-name", name)
        key = made["keys"][0]
        return Login(name, str(key["access_key"]), str(key["secret_key"]))

    def make_bucket(self, bucket: str, login: Login | None = None) -> None:
        """An empty one."""
        import boto3  # late: this module is read where nothing of it is used

        owner = login or self.login
        client = boto3.client(
            "s3",
            endpoint_url=self.address,
            region_name=REGION,
            aws_access_key_id=owner.access_key,
            aws_secret_access_key=owner.secret_key,
        )
        try:
            client.create_bucket(Bucket=bucket)
        finally:
            client.close()

    def remove_bucket(self, bucket: str) -> None:
        """With all that is in it."""
        self._admin("bucket", "rm", "--bucket", bucket, "--purge-objects", "--bypass-gc")

    def stop(self) -> None:
        for process in self._daemons.values():
            process.kill()
        for process in self._daemons.values():
            process.wait()
        self._daemons.clear()

    # --- starting

    def _start(self) -> Login:
        fsid, mon_port = str(uuid.uuid4()), free_port()
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir()
        (self.folder / "keyring").touch()
        self._configuration.write_text(
            _CONFIGURATION.format(
                fsid=fsid, mon_port=mon_port, port=self.port, folder=self.folder
            ).lstrip()
        )
        monmap = str(self.folder / "monmap")
        monitor = f"[v2:127.0.0.1:{mon_port}]"
        try:
            self._command("monmaptool", "--create", "--addv", "a", monitor, "--fsid", fsid, monmap)
            self._command("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
            self._run_daemon("mon", "ceph-mon", "-i", "a", "-f")
            self._command("ceph", "osd", "create")
            self._command("ceph-osd", "-i", "0", "--mkfs")
            self._run_daemon("osd", "ceph-osd", "-i", "0", "-f")
            login = self.make_login("blobcask")
            self.start_gateway()
        except BaseException:
            self.stop()
            raise
        return login

    @property
    def _configuration(self) -> Path:
        return self.folder / "ceph.conf"

    def _run_daemon(self, name: str, program: str, *options: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                # It ends with us, also where we are killed.
                ["setpriv", "--pdeathsig", "KILL", *self._line(program, options)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def _line(self, program: str, options: Sequence[str]) -> list[str]:
        found = find_program(program)
        assert found is not None, program
        return [found, "--conf", str(self._configuration), *options]

    def _command(self, program: str, *options: str) -> str:
        run = subprocess.run(
            self._line(program, options), capture_output=True, text=True, timeout=_COMMAND_S
        )
        if run.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(options)}: {run.stderr or run.stdout}")
        return run.stdout

    def _admin(self, *words: str) -> dict[str, Any]:
        answer = self._command("radosgw-admin", *words)
        form = json.loads(answer) if answer.strip() else {}
        assert isinstance(form, dict)
        return form

    def _await_gateway(self) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                try:
                    connection.request("GET", "/")
                    if connection.getresponse().status == http.HTTPStatus.OK:
                        return
                finally:
                    connection.close()
            status = self._daemons["gateway"].poll()
            if status is not None:
                out = (self.folder / "gateway.out").read_text()
                raise RuntimeError(f"radosgw ended with {status}: {out}")
            time.sleep(_STEP_S)
        raise TimeoutError("radosgw does not answer")


@contextmanager
def running(parent: Path | None = None) -> Iterator[Ceph]:
    """Start one, in a folder of its own below `parent`; its files are a few MiB."""
    with tempfile.TemporaryDirectory(prefix="ceph-", dir=parent) as folder:
        ceph = Ceph(Path(folder))
        try:
            yield ceph
        finally:
            ceph.stop()


def find_program(name: str) -> str | None:
    """Daemons are installed where a user's PATH often does not look."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")
