"""Who runs a model. Apart from the rest since it loads torch's compiler, which `import rlt.adapters` has no need of."""

from __future__ import annotations

import threading

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def runner() -> tuple[bool, int]:
    """A thread, or a backward pass, which has several and computes layers anew.

    No graph takes this in: it breaks here, and asks at every call.
    """
    backward = torch._C._current_graph_task_id()
    return (False, threading.get_ident()) if backward == -1 else (True, backward)
