"""Hostfiles and filters: which slots of which hosts take part, in the order of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from funczero.launch.error import LaunchError
from funczero.world.plain import plain

ENTRY = re.compile(r"(\S+)\s+slots=([0-9]+)(?:\s+max[-_]slots=[0-9]+)?\s*(?:#.*)?")
BYTES, SLOTS, RANKS = 1 << 20, 4096, 1 << 20  # of a hostfile; of a host; of a run: more is a slip of the pen
NAME = 320  # characters of user@name:port
WORD = "[A-Za-z0-9_.][A-Za-z0-9_.-]*"
# user@name:port; IPv6 bare or in brackets
HOST = re.compile(rf"(?:{WORD}@)?(?:{WORD}|[0-9A-Fa-f:.]+|\[[0-9A-Fa-f:.]+(?:%{WORD})?\])(?::[0-9]+)?")


def parse_hostfile(text: str, where: str = "hostfile") -> dict[str, int]:
    """Slots by host, in the order of the lines: that order is the order of the node ranks.

    A name holds no character that a shell, ssh or a resource manager could read as anything but a name.

    Args:
      text: lines `NAME slots=N`, optionally `max_slots=M` and a comment behind; empty lines and lines that start with
        `#` are skipped.
      where: what to call the file in a message.

    Raises:
      LaunchError: a line is neither, a host is named twice, or there is none.

    Source: DeepSpeed's `--hostfile`; OpenMPI's hostfile.

    >>> parse_hostfile("worker-1 slots=4\\nworker-2 slots=2 max_slots=4  # the small one\\n")
    {'worker-1': 4, 'worker-2': 2}
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        at, entry = f"{where}, line {number}", ENTRY.fullmatch(line)
        if entry is None:
            raise LaunchError(
                f"{at}: {plain(line, 300)!r} is no host; write NAME slots=N, for example worker-1 slots=4"
            )
        name = entry[1]
        if len(name) > NAME or not HOST.fullmatch(name):
            raise LaunchError(
                f"{at}: {plain(name, 300)!r} is no host name; write letters, digits, '.', '-', '_', and user@ or :port"
                " around them"
            )
        if name in hosts:
            raise LaunchError(f"{at}: {name!r} is listed a second time; write it once, with all its slots")
        if len(entry[2]) > 9 or int(entry[2]) > SLOTS:
            raise LaunchError(
                f"{at}: {name} has slots={plain(entry[2], 40)}, more than any host; write at most {SLOTS}"
            )
        hosts[name] = int(entry[2])
    if sum(hosts.values()) > RANKS:
        raise LaunchError(
            f"{where}: {sum(hosts.values())} slots in all are more than a run may have, {RANKS}; list fewer hosts"
        )
    if not hosts:
        raise LaunchError(f"{where}: no host in it; write a line for each, for example worker-1 slots=4")
    return hosts


def read_hostfile(path: str) -> dict[str, int]:
    """`parse_hostfile` of a file; a file that is not there is an error, never a world of this machine."""
    try:
        with open(path, "rb") as file:
            data = file.read(BYTES + 1)  # a pipe is a file as well, and /dev/zero
        if len(data) > BYTES:
            raise LaunchError(
                f"--hostfile={path}: it has more than {BYTES} bytes, and no hostfile is so long; name a file of lines"
                " such as worker-1 slots=4"
            )
        text = data.decode()
    except (OSError, ValueError) as error:
        if isinstance(error, LaunchError):
            raise
        reason = (
            error.strerror
            if isinstance(error, OSError)
            else "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "its name holds a NUL character"
        )
        raise LaunchError(
            f"--hostfile={path}: cannot be read ({reason}); name a file of lines such as worker-1 slots=4, or leave"
            " --hostfile out for this machine alone"
        ) from None
    return parse_hostfile(text, f"--hostfile={path}")


def choose(
    hosts: Mapping[str, int], include: str = "", exclude: str = "", num_nodes: int = -1, num_gpus: int = -1
) -> dict[str, tuple[int, ...]]:
    """The slots that take part, by host, in the order of the hostfile whatever the order of the filter.

    Args:
      hosts: slots by host.
      include, exclude: `NAME[:SLOT[,SLOT...]]` joined by `@`; a host with slots and without means those slots alone.
      num_nodes: the first so many hosts; 0 or less: all.
      num_gpus: the first so many slots of each host; 0 or less: all.

    Raises:
      LaunchError: the filters exclude each other, or name what the hostfile does not have.

    Source: DeepSpeed's `--include`, `--exclude`, `--num_nodes`, `--num_gpus`; more nodes or slots than there are is an
    error here.

    >>> choose({"worker-1": 4, "worker-2": 4}, include="worker-2@worker-1:0,2")
    {'worker-1': (0, 2), 'worker-2': (0, 1, 2, 3)}
    """
    pool = {host: tuple(range(n)) for host, n in hosts.items()}
    if include and exclude:
        raise LaunchError("--include and --exclude: only one of them can be given; --include names all that take part")
    if (include or exclude) and (num_nodes >= 0 or num_gpus >= 0):
        raise LaunchError(
            "--num_nodes and --num_gpus count from the first slot, so they go with neither --include nor --exclude;"
            " name the slots, for example worker-1:0,1"
        )
    if include:
        named = _filter("--include", include, hosts)
        return {host: tuple(sorted(named[host])) or slots for host, slots in pool.items() if host in named}
    if exclude:
        named = _filter("--exclude", exclude, hosts)
        kept = {
            host: tuple(s for s in slots if host not in named or (named[host] and s not in named[host]))
            for host, slots in pool.items()
        }
        return {host: slots for host, slots in kept.items() if slots}
    if num_nodes > len(pool):
        raise LaunchError(
            f"--num_nodes={num_nodes}: the hostfile has {len(pool)} host{'s' * (len(pool) > 1)}; write at most that"
            " many, or list more hosts"
        )
    if num_nodes > 0:
        pool = dict(list(pool.items())[:num_nodes])
    few = [host for host, slots in pool.items() if len(slots) < num_gpus]
    if few:
        raise LaunchError(
            f"--num_gpus={num_gpus}: {few[0]} has slots={len(pool[few[0]])}; write at most that many, or more slots in"
            " the hostfile"
        )
    return {host: slots[:num_gpus] if num_gpus > 0 else slots for host, slots in pool.items()}


def _filter(flag: str, text: str, hosts: Mapping[str, int]) -> dict[str, set[int]]:
    """A filter as slots by host; no slots: all of them."""
    named: dict[str, set[int]] = {}
    for part in _parts(text, hosts):
        host, colon, slots = (part, "", "") if part in hosts else part.rpartition(":")
        if not colon:
            host = part
        if host not in hosts:
            raise LaunchError(
                f"{flag}={text}: no host {host!r} in the hostfile; it lists {plain(', '.join(hosts), 500)}"
            )
        wanted = named.setdefault(host, set())
        for slot in slots.split(",") if colon else ():
            number = slot.strip()
            if not (number.isascii() and number.isdigit()):
                raise LaunchError(
                    f"{flag}={text}: {slot!r} is no slot of {host}; write numbers with commas, for example {host}:0,2"
                )
            if len(number) > 9 or int(number) >= hosts[host]:
                raise LaunchError(
                    f"{flag}={text}: {host} has no slot {number}; the hostfile gives it slots={hosts[host]}, counted"
                    " from 0"
                )
            wanted.add(int(number))
    return named


def _parts(text: str, hosts: Mapping[str, int]) -> list[str]:
    """The parts between `@`, where hosts themselves hold one (`user@host`): a piece that ends no host is joined to
    the next.
    """
    parts: list[str] = []
    users = [host for host in hosts if "@" in host]
    for piece in text.split("@"):
        joined = f"{parts[-1]}@{piece}" if parts else ""
        if any(host.startswith(f"{parts[-1]}@") and f"{joined}:".startswith(f"{host}:") for host in users if parts):
            parts[-1] = joined
        else:
            parts.append(piece)
    return parts
