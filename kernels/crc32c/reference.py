"""CRC-32C (Castagnoli), the checksum of zarr's `crc32c` codec, a byte at a time.

Source: RFC 3720, section 12.1 and appendix B.4.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

POLYNOMIAL = 0x82F63B78  # its bits in the order in which they come


def crc32c(x: Tensor, before: int = 0) -> int:
    """The checksum of bytes.

    Law: crc32c(ab) = crc32c(b, crc32c(a)).

    Args:
      x: [n] uint8, contiguous, on the CPU.
      before: the checksum of what stands in front of them.

    >>> hex(crc32c(torch.tensor(list(b"123456789"), dtype=torch.uint8)))
    '0xe3069283'
    """
    if x.dtype != torch.uint8 or x.dim() != 1:
        raise TypeError(f"crc32c: it takes bytes [n] of torch.uint8, not {x.dtype} {list(x.shape)}; write x.view(...)")
    crc, table = before ^ 0xFFFFFFFF, _table()
    for byte in x.tolist():
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def read(file: int, start: int, out: Tensor) -> int:
    """Fill memory from a file, and return its checksum.

    Args:
      file: a descriptor.
      start: in bytes.
      out: [n] uint8, contiguous, on the CPU.

    Raises:
      OSError: it cannot be read.
      EOFError: it ends earlier.
    """
    done = 0
    while done < len(out):
        text = os.pread(file, len(out) - done, start + done)
        if not text:
            raise EOFError(f"the file ends {len(out) - done} bytes early")
        out[done : done + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        done += len(text)
    return crc32c(out)


def write(file: int, start: int, x: Tensor) -> int:
    """Write memory into a file, and behind it its checksum, four bytes of which the lowest comes first; return it.

    Args:
      file: a descriptor.
      start: in bytes.
      x: [n] uint8, contiguous, on the CPU.

    Raises:
      OSError: it cannot be written.
    """
    crc = crc32c(x)
    text = memoryview(x.numpy().tobytes() + crc.to_bytes(4, "little"))
    while text:
        done = os.pwrite(file, text, start)
        text, start = text[done:], start + done
    return crc


@cache
def _table() -> tuple[int, ...]:
    """What a byte makes of a remainder."""
    out = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (POLYNOMIAL if crc & 1 else 0)
        out.append(crc)
    return tuple(out)
