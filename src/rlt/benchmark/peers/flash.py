"""Other implementations of flash attention behind torch's own operators, where torch and the machine have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.attention

from rlt.checks import one_of
from rlt.errors import InvalidArgumentError


@contextmanager
def flash_attention(name: str | None) -> Iterator[None]:
    """Let torch's flash kernels run as the named implementation within a `with` block; None changes nothing.

    Raises:
        InvalidArgumentError: if this torch knows no such implementation, or it cannot be loaded here.
    """
    if name is None:
        yield
        return
    tools: Any = torch.nn.attention  # which have it from torch 2.11 on
    if not hasattr(tools, "activate_flash_attention_impl"):
        raise InvalidArgumentError(f"flash is {name!r}, but torch {torch.__version__} has its own alone; leave it out")
    one_of(tools.list_flash_attention_impls(), flash=name)
    try:
        tools.activate_flash_attention_impl(name)
    except Exception as error:  # packages of kernels fail in many ways where they are missing or built for others
        raise InvalidArgumentError(f"flash is {name!r}, which does not load here ({error}); leave it out") from error
    try:
        yield
    finally:
        tools.restore_flash_attention_impl()
