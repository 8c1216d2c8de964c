"""Checksums of tensors on their own devices: equal for equal bits, whatever the strides. No communication.

A checksum that was made on a GPU is not that of the same values on a CPU. On a CPU it is the CRC-32 of the row-major
bytes, read in place. On another device it is an integer sum, which is the same in any order: every 8 bytes are mixed
with their position (splitmix64: Steele, Lea, Flood 2014) and added up modulo 2^64. The sums of all tensors of a device
are brought to the host in one small copy. Both ways take bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dist_ema.disk.formats.checksums import checksum

__all__ = ["CHUNK_NUMEL", "chunks", "device_checksum", "tensor_checksums"]

# The elements that are read at a time where they have to be copied or mixed: at most 8 MiB for each of a few buffers.
CHUNK_NUMEL = 2**20

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The constants of splitmix64, as signed integers.
_STEP, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@torch.no_grad()
def tensor_checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """One integer for each tensor; the call waits for the devices of the tensors."""
    checksums = [0] * len(tensors)
    on_device: dict[torch.device, list[int]] = {}
    for index, values in enumerate(tensors):
        if values.device.type == "cpu":
            checksums[index] = _host_checksum(values)
        else:
            on_device.setdefault(values.device, []).append(index)
    for indices in on_device.values():
        sums = torch.stack([device_checksum(tensors[index]) for index in indices]).tolist()
        for index, value in zip(indices, sums, strict=True):
            checksums[index] = value
    return checksums


def _host_checksum(values: torch.Tensor) -> int:
    if values.is_contiguous() and values.numel():
        return checksum(_bytes(values))
    so_far = 0
    for chunk in chunks(values):
        so_far = checksum(_bytes(chunk), so_far)
    return so_far


def _bytes(values: torch.Tensor) -> memoryview:
    flat = values.detach().reshape(-1)
    content: memoryview = _real(flat).view(torch.uint8).numpy().data
    return content


def _real(flat: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat


@torch.no_grad()
def device_checksum(values: torch.Tensor) -> torch.Tensor:
    """The checksum as one int64 on the device of the values, without a host sync."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    position = 0
    for chunk in chunks(values):
        words = _words(_real(chunk))
        positions = torch.arange(position, position + len(words), dtype=torch.int64, device=values.device)
        total += _mixed(positions.mul_(_STEP).add_(words)).sum()
        position += len(words)
    return total


def _words(flat: torch.Tensor) -> torch.Tensor:
    """The bits as integers: of 8 bytes where the size allows it. The split depends on dtype and size only."""
    if flat.numel() * flat.element_size() % 8 == 0:
        aligned = flat if flat.data_ptr() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0 else None
        return (flat.clone() if aligned is None else aligned).view(torch.int64)
    return flat.view(_INTEGERS[flat.element_size()]).to(torch.int64)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Mix the words by splitmix64, in place. Shifts of torch keep the sign, which mixes as well."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words.bitwise_xor_(words >> shift).mul_(factor)
    return words.bitwise_xor_(words >> 31)


def chunks(values: torch.Tensor, numel: int = CHUNK_NUMEL) -> Iterator[torch.Tensor]:
    """The values in row-major order, in flat chunks of at most `numel` elements; the shape alone decides the cuts."""
    if values.numel() <= numel or values.dim() == 0:
        yield values.reshape(-1)
        return
    row_numel = values.numel() // values.shape[0]
    if row_numel > numel:
        for row in values:
            yield from chunks(row, numel)
        return
    for rows in values.split(numel // row_numel):
        yield rows.reshape(-1)
