"""A real S3 server for the tests: Ceph's object gateway with one monitor and one store in memory, on
127.0.0.1 alone.

Needs Debian's radosgw, ceph-mon and ceph-osd (`make packages`).
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support.ports import free_port, free_ports

PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool")
ACCESS, SECRET = "test", "testtest-testtest"
PATIENCE_S = 180.0

# No authentication within, nothing on any other address, one copy of everything, and short waits.
CONFIG = """
[global]
fsid = {fsid}
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail warn = 2
mon data avail crit = 1
paxos propose interval = 0.05
paxos min wait = 0.02
ms mon client mode = crc
ms mon service mode = crc
ms mon cluster mode = crc
[mon]
mon data = {folder}/mon
mon max pg per osd = 1000
[osd]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd check max object name len on startup = false
osd class load list = *
osd class default list = *
osd op num shards = 1
osd op num threads per shard = 1
[client]
keyring = {folder}/keyring
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
rgw run sync thread = false
rgw enable gc threads = false
rgw enable lc threads = false
rgw enable usage log = false
rgw enable ops log = false
rgw rados pool pg num min = 1
rgw dns name = 127.0.0.1
rgw override bucket index max shards = 1
rgw thread pool size = 32
"""


def missing() -> list[str]:
    """Programs that are not here; none where the gateway can be started."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def answers(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait_for(what: str, true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"the object store: {what} did not come within {PATIENCE_S:g} s")
        time.sleep(0.1)


@dataclass
class Gateway:
    """folder: for its files, of few letters (its sockets' names are short). The store outlives the
    gateway."""

    folder: Path
    port: int = field(default_factory=free_port)
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        for name in ("mon", "osd"):
            (self.folder / name).mkdir(parents=True)
        fsid, (v1, v2) = str(uuid.uuid4()), free_ports(2)
        config = CONFIG.format(fsid=fsid, folder=self.folder, port=self.port, v1=v1, v2=v2)
        (self.folder / "ceph.conf").write_text(config)
        for user, rights in (("mon.", ["mon"]), ("client.admin", ["mon", "osd", "mgr"])):
            caps = [word for right in rights for word in ("--cap", right, "allow *")]
            new = [] if (self.folder / "keyring").exists() else ["--create-keyring"]
            self._run("ceph-authtool", *new, "keyring", "--gen-key", "-n", user, *caps)
        monitor = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, "monmap")
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
        self._spawn("ceph-mon", "-i", "a")
        disk = str(uuid.uuid4())
        self._run("ceph", "osd", "new", disk)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._spawn("ceph-osd", "-i", "0")
        self._run("ceph", "osd", "crush", "add", "0", "1.0", "host=here", "root=default")
        wait_for("its store", lambda: "1 up" in self._run("ceph", "osd", "stat"))
        keys = ("--access-key", ACCESS, "--secret-key", SECRET)
        self._run("radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests", *keys)
        self.resume()

    def resume(self) -> None:
        """Starts the gateway alone; what is stored is there."""
        self._spawn("radosgw", "-n", "client.admin")
        wait_for("its gateway", lambda: answers(self.port))

    def kill(self) -> None:
        """The gateway alone, as a crash would."""
        process = self._processes.pop("radosgw")
        process.kill()
        process.wait()

    def user(self, change: str) -> None:
        """suspend: the keys of the tests are refused from now on; enable."""
        self._run("radosgw-admin", "user", change, "--uid=tests")

    def stop(self) -> None:
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()
        self._processes.clear()

    def _command(self, program: str, *words: str) -> list[str]:
        # ceph-authtool and monmaptool take the file as their argument and know no -c before it.
        config = [] if program in ("ceph-authtool", "monmaptool") else ["-c", "ceph.conf"]
        return [program, *config, *words]

    def _run(self, program: str, *words: str) -> str:
        done = subprocess.run(
            self._command(program, *words),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(words)}: {done.stderr[-500:]}")
        return done.stdout

    def _spawn(self, program: str, *words: str) -> None:
        log = (self.folder / f"{program}.out").open("wb")
        command = [*self._command(program, *words), "-f"]
        self._processes[program] = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        log.close()
