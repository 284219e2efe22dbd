"""Hosts to test a launcher on: namespaces of this machine with a name, a network, processes and a real sshd of their
own. Needs root and Linux.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NET = "10.77.0"

INIT = """
import os, pwd, socket, subprocess, sys
name, folder = sys.argv[1:]
keys = os.path.join(pwd.getpwuid(os.getuid()).pw_dir, ".ssh")  # where ssh looks, whatever HOME says
socket.sethostname(name)
os.makedirs("/run/sshd", exist_ok=True)
os.makedirs(keys, exist_ok=True)
for source, target in ((f"{folder}/hosts", "/etc/hosts"), (f"{folder}/ssh", keys)):
    subprocess.run(["mount", "--bind", source, target], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
log = open(f"{folder}/{name}.sshd", "w")
sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", f"{folder}/sshd_config"], stderr=log)
while True:  # the first process of a process namespace collects everybody's children
    try:
        os.wait()
    except ChildProcessError:
        break
"""

SSHD = """
HostKey {folder}/ssh/id_ed25519
AuthorizedKeysFile {folder}/ssh/id_ed25519.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
MaxStartups 100
SetEnv PYTHONPATH={root} OMP_NUM_THREADS=1 TMPDIR={folder}/tmp
"""


class Host(NamedTuple):
    """One namespace; `init` is its first process as seen from outside."""

    name: str
    init: int
    outer: subprocess.Popen

    def enter(self, words: Sequence[str]) -> list[str]:
        """A command line that runs words on this host."""
        return ["nsenter", "--all", f"--wd={os.getcwd()}", "-t", str(self.init), "--", *words]

    def processes(self) -> dict[int, str]:
        """Command lines of what runs here besides the first process and the listening sshd, by process id as seen from
        outside.
        """
        return {
            pid: words
            for pid, words in _everything(self).items()
            if words and pid != self.init and "[listener]" not in words
        }

    def kill(self) -> None:
        """The power goes: every process at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self.outer.wait()


def _everything(host: Host) -> dict[int, str]:
    found: dict[int, str] = {}
    with contextlib.suppress(OSError):  # it has ended
        space = os.readlink(f"/proc/{host.init}/ns/pid")
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/ns/pid") == space:
                    found[int(name)] = (
                        Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    )
    return found


def missing(*tools: str) -> str:
    """The tools that are not installed, or why there can be no namespaces; '' when all is well."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return "namespaces need root on Linux"
    absent = [
        tool
        for tool in ("ip", "unshare", "nsenter", "ssh", "sshd", "ssh-keygen", *tools)
        if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    if absent:
        return f"not installed: {', '.join(absent)}"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--uts", "--mount", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def cluster(names: Sequence[str] = ("worker-0", "worker-1", "worker-2")) -> Iterator[dict[str, Host]]:
    """Hosts that see each other and share this machine's files; the first one is the switch between the others."""
    folder = Path(tempfile.mkdtemp(prefix="funczero-hosts-"))
    for part in ("ssh", "tmp"):
        (folder / part).mkdir(mode=0o700)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ssh" / "id_ed25519")], check=True
    )
    key = (folder / "ssh" / "id_ed25519.pub").read_text().split()[:2]
    (folder / "ssh" / "known_hosts").write_text(
        "".join(f"{name},{NET}.{10 + i} {' '.join(key)}\n" for i, name in enumerate(names))
    )
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{NET}.{10 + i} {name}\n" for i, name in enumerate(names))
    )
    (folder / "sshd_config").write_text(SSHD.format(folder=folder, root=ROOT))
    hosts: dict[str, Host] = {}
    try:
        for name in names:
            hosts[name] = _start(name, folder)
        _connect(list(hosts.values()))
        yield hosts
    finally:
        for host in hosts.values():
            host.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _start(name: str, folder: Path) -> Host:
    space = ["unshare", "--net", "--pid", "--uts", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc"]
    outer = subprocess.Popen([*space, sys.executable, "-c", INIT, name, str(folder)])
    children, deadline = Path(f"/proc/{outer.pid}/task/{outer.pid}/children"), time.monotonic() + 20
    while not children.read_text().split():
        assert time.monotonic() < deadline and outer.poll() is None, f"{name} did not start"
        time.sleep(0.01)
    host = Host(name, int(children.read_text().split()[0]), outer)
    while not any("[listener]" in words for words in _everything(host).values()):
        assert time.monotonic() < deadline and outer.poll() is None, f"{name}: {(folder / f'{name}.sshd').read_text()}"
        time.sleep(0.02)
    return host


def _connect(hosts: list[Host]) -> None:
    """A bridge on the first host, a cable to each other one; nothing of it is outside the namespaces."""
    first, bridge = (
        hosts[0],
        f"set -e; ip link add br0 type bridge; ip addr add {NET}.10/24 dev br0; ip link set br0 up",
    )
    _sh(first, bridge)
    for i, host in enumerate(hosts[1:], 1):
        subprocess.run(
            [
                "ip",
                "link",
                "add",
                f"to{i}",
                "netns",
                str(first.init),
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                str(host.init),
            ],
            check=True,
        )
        _sh(first, f"ip link set to{i} master br0 up")
        _sh(host, f"ip addr add {NET}.{10 + i}/24 dev eth0; ip link set eth0 up")


def _sh(host: Host, script: str) -> None:
    subprocess.run(["nsenter", "--net", "-t", str(host.init), "sh", "-c", script], check=True)


def cut(hosts: dict[str, Host], name: str) -> None:
    """The cable of a host is pulled: nobody is told."""
    number = list(hosts).index(name)
    _sh(hosts[next(iter(hosts))], f"ip link set to{number} down")


SLURM = """
ClusterName=test
SlurmctldHost={names[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/%n.munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n.spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
NodeName={nodes} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@contextlib.contextmanager
def slurm(hosts: dict[str, Host]) -> Iterator[dict[str, str]]:
    """SLURM over all hosts, the first one its controller; yields the environment its commands need. Its daemons end
    with it.
    """
    folder, names = Path(tempfile.mkdtemp(prefix="funczero-slurm-")), list(hosts)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    (folder / "state").mkdir()
    daemons: list[subprocess.Popen] = []

    def daemon(host: Host, *words: str) -> None:
        log = (folder / f"{host.name}.{words[0]}").open("w")
        daemons.append(
            subprocess.Popen(
                host.enter(words), env=os.environ | {"SLURM_CONF": str(folder / host.name)}, stdout=log, stderr=log
            )
        )

    def until(words: Sequence[str], want: str) -> None:
        deadline = time.monotonic() + 30
        while (
            want not in subprocess.run(
                words, env=os.environ | {"SLURM_CONF": str(folder / names[0])}, capture_output=True, text=True
            ).stdout
        ):
            assert time.monotonic() < deadline, {log.name: log.read_text()[-500:] for log in folder.glob("*.*d")}
            time.sleep(0.2)

    try:
        for name, host in hosts.items():
            conf = SLURM.format(names=names, folder=folder, nodes=",".join(names))
            (folder / name).write_text(conf.replace(f"{folder}/%n.munge", f"{folder}/{name}.munge"))
            files = [f"--{kind}={folder}/{name}.{kind}" for kind in ("pid-file", "log-file", "seed-file")]
            daemon(
                host, "munged", "-F", "--force", f"--key-file={folder}/key", f"--socket={folder}/{name}.munge", *files
            )
        for name in names:
            until(["ls", str(folder)], f"{name}.munge\n")
        daemon(hosts[names[0]], "slurmctld", "-D")
        for name, host in hosts.items():
            daemon(host, "slurmd", "-D", "-N", name)
        until(hosts[names[0]].enter(["sinfo", "-h", "-o", "%D %t"]), f"{len(names)} idle")
        yield {"SLURM_CONF": str(folder / names[0])}
    finally:
        for process in reversed(daemons):
            process.terminate()
        for process in daemons:
            process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)
