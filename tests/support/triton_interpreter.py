"""Triton's kernels without a GPU: by its interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from support.deadlines import DEADLINE_S

TESTS: Final = Path(__file__).resolve().parents[1]
VARIABLE: Final = "TRITON_INTERPRET"
ON: Final = os.environ.get(VARIABLE) == "1"
"""Kernels of this process are interpreted. That must be so from its beginning, since triton looks only once."""


def run(module: str, *arguments: str) -> str:
    """Runs a module as a program whose kernels are interpreted; returns what it printed. Raises AssertionError with the
    end of that if it fails, subprocess.TimeoutExpired if it takes twice as long as an event may."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],
        cwd=TESTS,
        env={**os.environ, VARIABLE: "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-4_000:]
    return done.stdout


def mend() -> None:
    """Scalars become loop bounds: they are arrays of one element, which NumPy since 2.4 does not take for a number. And
    products of bfloat16 take the numbers, not their bits."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    own_patch, own_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch(tensor: Any, scope: Any) -> None:
        own_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return own_dot(self, widened(a), widened(b), *others)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = dot


if ON:
    mend()
