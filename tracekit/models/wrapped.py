"""What can be traced: a module, and no wrapper that runs it for several processes or devices."""

from __future__ import annotations

from typing import Final

from torch import nn

from tracekit.errors import InputError

# By name, and of FSDP the first: what FSDP2's fully_shard gives is the module itself.
_WRAPPERS: Final = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_module(module: object) -> None:
    """InputError for what is no module, and for a wrapper: its runs are not those of the one."""
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise InputError(
            f"Model takes a torch.nn.Module, not {kind}; "
            f"LanguageModel loads one by its Hub id or directory."
        )
    if kind in _WRAPPERS and type(module).__module__.startswith("torch."):
        raise InputError(
            f"Model takes the module that {kind} wraps, as its replicas, and what it does to "
            f"weights and gradients, are no part of what is traced: write Model(module.module), or "
            f"shard the module with fully_shard (FSDP2), which leaves it what it is."
        )
