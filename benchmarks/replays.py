"""What a GPU does for a call, without what the host does: calls recorded in a CUDA graph, which is replayed.

Between two launches of small kernels a GPU waits for Python. A model's training step may hide that behind larger
kernels, or be recorded itself; so the two are told apart.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .timing import TURN_MS, Call, turn_ms

#: Of so many calls at most a graph is made.
MOST_CALLS = 64

#: What a recording failed with. After one there is no other in this process.
_failures: list[Exception] = []


@dataclass(frozen=True)
class Recording:
    """Calls as one.

    Attributes:
        replay: runs all of them.
        calls: how many they are.
    """

    replay: Call
    calls: int


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Everything inside is on one stream that isn't the default one, which can't be recorded."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def as_called_ms(call: Call, device: torch.device) -> float:
    """Milliseconds a call, one after another, each as soon as the host has it ready."""
    first = turn_ms(call, 0, 1, device)
    return turn_ms(call, 0, max(3, round(TURN_MS / first)), device)


def record(call: Call, sets: int, ms: float, device: torch.device) -> Recording | None:
    """Calls of each set of inputs in turn, as many times as make a turn; None where a call can't be recorded.

    Args:
        call: warm, on the current stream, which is not the default one.
        sets: sets of inputs that calls go through.
        ms: what one takes as called.
    """
    if _failures or _waits(call, device):
        return None
    calls = sets * max(1, min(MOST_CALLS, int(TURN_MS / ms)) // sets)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            for i in range(calls):
                call(i)
    except Exception as error:  # a rival's, or CUDA's of what is not allowed meanwhile
        # PyTorch's allocator does not get over a recording that CUDA has ended.
        warnings.warn(f"no more calls are recorded, all are timed as called: {error}", stacklevel=2)
        _failures.append(error)
        return None
    graph.replay()  # the first takes longer
    return Recording(lambda _: graph.replay(), calls)


def _waits(call: Call, device: torch.device) -> bool:
    """Whether the host waits for the GPU in a call, which can't be recorded then."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except Exception:  # PyTorch's RuntimeError, or what a call makes of it
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False
