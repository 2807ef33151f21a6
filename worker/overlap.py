"""How kernels of the step path overlap where the device can (Hopper and later).

`gdc_launch_dependents` lets the next kernel in the stream begin while this one runs, and `gdc_wait` is where it then
waits until everything before it has ended (programmatic dependent launch, CUDA C++ programming guide 4.5). Every kernel
that is launched so waits before it reads or writes anything but weights, so that the order of all other memory
operations is that of the stream.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def overlap_options(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel: whether it overlaps with its neighbours on this device."""
    if device.type != "cuda":
        return {"OVERLAP": False}  # Triton's interpreter, in tests
    able = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": able, "launch_pdl": able}
