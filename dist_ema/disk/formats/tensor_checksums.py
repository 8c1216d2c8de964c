"""Checksums of tensors where they lie: equal for equal bits, whatever the strides. No communication.

On a CPU the CRC-32 of the row-major bytes, read in place. On a device an integer sum, which comes out the same in any
order: every 8 bytes are mixed with their position (splitmix64: Steele, Lea, Flood 2014) and added up modulo 2^64. All
tensors of a device are brought to the host in one small copy. Both take bounded memory. A checksum made on a device is
not that of the same values on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dist_ema.disk.formats.checksums import checksum

__all__ = ["CHUNK_NUMEL", "chunks", "device_checksum", "tensor_checksums"]

# Elements that are read at a time where they have to be copied or mixed: at most 8 MiB for each of a few buffers.
CHUNK_NUMEL = 2**20

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Of splitmix64, as signed integers.
_STEP, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@torch.no_grad()
def tensor_checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """One integer for each tensor; waits for the devices they lie on."""
    found = [0] * len(tensors)
    on_device: dict[torch.device, list[int]] = {}
    for index, values in enumerate(tensors):
        if values.device.type == "cpu":
            found[index] = _host_checksum(values)
        else:
            on_device.setdefault(values.device, []).append(index)
    for indices in on_device.values():
        sums = torch.stack([device_checksum(tensors[index]) for index in indices]).tolist()
        for index, value in zip(indices, sums, strict=True):
            found[index] = value
    return found


def _host_checksum(values: torch.Tensor) -> int:
    if values.is_contiguous() and values.numel():
        return checksum(_bytes(values))
    found = 0
    for chunk in chunks(values):
        found = checksum(_bytes(chunk), found)
    return found


def _bytes(values: torch.Tensor) -> memoryview:
    flat = values.detach().reshape(-1)
    content: memoryview = _real(flat).view(torch.uint8).numpy().data
    return content


def _real(flat: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat


@torch.no_grad()
def device_checksum(values: torch.Tensor) -> torch.Tensor:
    """The checksum as one int64 where the values lie, without a host sync."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    position = 0
    for chunk in chunks(values):
        words = _words(_real(chunk))
        positions = torch.arange(position, position + len(words), dtype=torch.int64, device=values.device)
        total += _mixed(positions.mul_(_STEP).add_(words)).sum()
        position += len(words)
    return total


def _words(flat: torch.Tensor) -> torch.Tensor:
    """The bits as integers, 8 bytes each where their number allows it; how depends on dtype and size only."""
    if flat.numel() * flat.element_size() % 8 == 0:
        aligned = flat if flat.data_ptr() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0 else None
        return (flat.clone() if aligned is None else aligned).view(torch.int64)
    return flat.view(_INTEGERS[flat.element_size()]).to(torch.int64)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """splitmix64, in place. Shifts of torch keep the sign, which mixes as well."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words.bitwise_xor_(words >> shift).mul_(factor)
    return words.bitwise_xor_(words >> 31)


def chunks(values: torch.Tensor, numel: int = CHUNK_NUMEL) -> Iterator[torch.Tensor]:
    """The values in row-major order, in flat pieces of at most `numel` elements; where they are cut the shape tells."""
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
