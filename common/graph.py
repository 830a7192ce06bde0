"""Work that a GPU repeats by itself: captured once as a CUDA graph, then replayed without the host's part of it."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # times that work is done as ever, in which libraries and the optimiser allocate what they keep


class Replayed:
    """Does work on a few items, and, from some time on, has the GPU repeat what it then did.

    The work must not make the host wait for the device, must do the same each time but for the items, and must use memory
    that stays: weights, the optimiser's state, tables that items are looked up in. Gradients may be new each time.

    Args:
        n: how many items are captured; the work on another number of them is done as ever.
        device: a GPU.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self._items = torch.zeros(n, dtype=torch.int64, device=device)
        self._left, self._graph, self._given_up = _WARM_UP, None, False

    def forget(self) -> None:
        """Captures the work anew, since numbers of the host that went into it have changed."""
        self._graph = None

    def __call__(self, work: Callable[[Tensor], None], items: Tensor) -> None:
        """Does the work on items (n,) in the device's memory."""
        if self._given_up or len(items) != len(self._items):
            work(items)
        elif self._left:
            self._left -= 1
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            # As PyTorch asks for, or else its backward pass would stay bound to `here`.
            with torch.cuda.stream(aside):
                work(items)
            here.wait_stream(aside)
        else:
            self._items.copy_(items)
            if self._graph is None and not self._capture(work):
                work(items)
            else:
                self._graph.replay()

    def _capture(self, work: Callable[[Tensor], None]) -> bool:
        """Captures the work, which is not done thereby; returns whether it could be."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work(self._items)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            print(f"Not captured as a CUDA graph, goes on without: {reason}", file=sys.stderr)
            self._given_up = True
            return False
        self._graph = graph
        return True
