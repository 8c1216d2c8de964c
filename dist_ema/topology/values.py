"""The tensors whose values are whole and plain bytes, which can be averaged and stored. No communication.

A file of the bytes of a tensor subclass may lack its values: the subclass may keep them elsewhere, or need constants to
read them (quantised weights). A parameter whose values an unknown engine has taken away has no values at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_ema.errors import UnsupportedModelError
from dist_ema.topology.seam.layout import Named
from dist_ema.topology.seam.loaded import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["check_tensor", "foreign_kind", "name_of_inner"]

# The attributes that DeepSpeed's ZeRO-3 gives a parameter when it takes the values away.
_PARTITIONED = ("ds_id", "ds_shape", "ds_tensor", "ds_status")
# The sizes that modules of torch declare; all are positive where a weight has elements.
_DECLARED = (
    ("out_features", "in_features"),
    ("num_embeddings", "embedding_dim"),
    ("out_channels", "in_channels"),
    ("num_features",),
    ("normalized_shape",),
)


def foreign_kind(tensor: object) -> str | None:
    """The kind of a tensor whose bytes alone are not its values; None for a plain tensor, also in a DTensor."""
    if is_dtensor(tensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    if not isinstance(tensor, torch.Tensor):
        return None
    kind = type(tensor)
    # `nn.Parameter(subclass)` is an instance of the subclass. A subclass without a dispatch of its own is plain, as are
    # torchvision's tv_tensors.
    wraps = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or hasattr(kind, "__tensor_flatten__")
    of_torch = kind.__module__.split(".")[0] == "torch"
    packs = issubclass(kind, nn.Parameter) and not of_torch and not tensor.dtype.is_floating_point
    if wraps or packs:
        return f"{kind.__module__}.{kind.__qualname__}"
    return str(tensor.dtype) if tensor.is_quantized else None


def name_of_inner(tensor: DTensor) -> str | None:
    """The attribute that has the local tensor, as torch's protocol of wrappers tells it; None if there is not one.

    `to_local()` makes a new parameter at each call, which takes longer than to compare the attribute.
    """
    names, _ = tensor.__tensor_flatten__()
    inner = [name for name in names if isinstance(getattr(tensor, name), torch.Tensor)]
    return inner[0] if len(inner) == 1 else None


def check_tensor(named: Named) -> None:
    """Refuse a tensor that has no values of its own, or whose values do not lie row by row.

    Raises:
        UnsupportedModelError: the tensor is on the meta device, partitioned, freed, expanded, or not dense.
    """
    fqn, tensor = named.fqns[0], named.source
    if not isinstance(tensor, torch.Tensor):
        return
    if tensor.is_meta:
        raise UnsupportedModelError(
            f"{fqn} is on the meta device and has no values: materialise the model first (to_empty, then its "
            "initialisation or a load)"
        )
    if isinstance(tensor, nn.Parameter) and not is_dtensor(tensor):
        _check_present(named, tensor)
    if tensor.layout is not torch.strided:
        raise UnsupportedModelError(f"{fqn} has layout {tensor.layout}, expected a dense tensor")
    if tensor.numel() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise UnsupportedModelError(f"{fqn} is expanded: several of its elements share memory. Make it contiguous()")


def _check_present(named: Named, tensor: torch.Tensor) -> None:
    """Refuse a parameter whose values an engine has taken away."""
    fqn = named.fqns[0]
    if any(hasattr(tensor, name) for name in _PARTITIONED):
        whole = list(getattr(tensor, "ds_shape", ()))
        raise UnsupportedModelError(
            f"{fqn} is partitioned by DeepSpeed ZeRO-3: it has shape {list(tensor.shape)} here, {whole} as a whole, "
            "but not all of the attributes by which its values are found (those of DeepSpeed 0.19). Use such a "
            "version, shard the model with fully_shard (FSDP2), or use ZeRO-1 or 2"
        )
    if tensor.numel() == 0:
        contradiction = _contradiction(named, tensor)
        if contradiction is not None:
            raise UnsupportedModelError(
                f"{fqn} has shape {list(tensor.shape)}, but {contradiction}: an engine has taken its values away, and "
                "its average would be one of nothing. Expected parameters that hold their values: shard the model with "
                "fully_shard (FSDP2)"
            )
    elif tensor.layout is torch.strided and tensor.untyped_storage().nbytes() == 0:
        raise UnsupportedModelError(
            f"{fqn} has shape {list(tensor.shape)}, but its memory was freed: an engine gathers it when it is used. "
            "Expected parameters that hold their values: shard the model with fully_shard (FSDP2)"
        )


def _contradiction(named: Named, tensor: torch.Tensor) -> str | None:
    """The clause of a sentence that shows that a parameter without elements should have some; None if nothing does."""
    for name, value in vars(tensor).items():
        if isinstance(value, torch.Tensor) and value.numel():
            return f"its attribute {name} holds {value.numel()} elements"
        if isinstance(value, tuple | list) and value and all(_is_positive(size) for size in value):
            return f"its attribute {name} is {list(value)}"
    for names in _DECLARED if named.attribute in ("weight", "bias") else ():
        sizes = [getattr(named.owner, name, 0) for name in names]
        flat = list(sizes[0]) if isinstance(sizes[0], tuple | list) else sizes
        if flat and all(_is_positive(size) for size in flat):
            return f"its module has {', '.join(f'{name}={getattr(named.owner, name)}' for name in names)}"
    return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
