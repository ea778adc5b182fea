"""A block of columns rounded in one launch: the innermost loop of `models.quantize.feedback`, as a Triton kernel.

torch's loop takes eight launches a column, each for hardly any arithmetic: 32,767 for 4,096 columns, which become 255
(half of them the products between blocks). Here a program takes some outputs, which don't depend on each other, through
all columns of the block, one after the other; a column's errors stay in registers until the last one is paid for. The
codes are torch's, but where a target lies within float32's noise of the edge between two: sums run in another order.

It has neither run nor been timed on a GPU yet, but in Triton's interpreter, and was compiled for GPUs.
"""

import os
import shutil

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTPUTS = 32  # of a program: one warp, a thread each, so that no thread waits for another; few, so that all cores work
WHOLE = tl.constexpr(12582912.0)  # 1.5 · 2²³: float32 has no fractions there, so that adding it rounds, half to even


def runs_on(device: torch.device) -> bool:
    """On a GPU, where there is a C compiler, which Triton makes its launcher with; elsewhere in Triton's interpreter
    alone (TRITON_INTERPRET=1), where it is far slower than torch.
    """
    compiler = "CC" in os.environ or shutil.which("gcc") or shutil.which("clang")
    return (device.type == "cuda" and bool(compiler)) or bool(triton.knobs.runtime.interpret)


def round_block(
    originals: Tensor,
    targets: Tensor,
    errors: Tensor,
    G: Tensor,
    groups: Tensor,
    S: Tensor,
    Z: Tensor,
    M: Tensor | None,
    top: int,
) -> None:
    """Rounds columns from the last to the first. Leaves codes in `targets`, and `errors` of the weights.

    originals, targets, errors: (columns, out) float32, contiguous. G: (columns, columns) float32, unit lower
    triangular, any strides. groups: (columns,) int32, contiguous, rows of S, Z and M: scale, zero and shift, (groups,
    out) float32, contiguous; zero holds whole numbers, and codes go from 0 to `top`.
    """
    columns, out = targets.shape
    # Triton launches on the current GPU, whichever the tensors are on.
    with torch.cuda.device_of(targets):  # type: ignore[no-untyped-call]
        round_columns_of_some_outputs[(triton.cdiv(out, OUTPUTS),)](
            originals,
            targets,
            errors,
            G,
            groups,
            S,
            Z,
            S if M is None else M,
            columns,
            out,
            *G.stride(),
            top,
            SHIFTED=M is not None,
            COLUMNS=triton.next_power_of_2(columns),
            OUTPUTS=OUTPUTS,
            num_warps=1,
            enable_fp_fusion=True,  # the default of Triton, which is about to change
        )


@triton.jit  # type: ignore[untyped-decorator]
def round_columns_of_some_outputs(
    originals: tl.tensor,
    targets: tl.tensor,
    errors: tl.tensor,
    G: tl.tensor,
    groups: tl.tensor,
    S: tl.tensor,
    Z: tl.tensor,
    M: tl.tensor,
    columns: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    top: tl.tensor,
    SHIFTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    present = output < out
    column = tl.arange(0, COLUMNS)
    E = tl.zeros((COLUMNS, OUTPUTS), dtype=tl.float32)  # nothing yet of the columns that are still to come
    for step in range(columns):
        i = columns - 1 - step
        at = i * out + output
        group = tl.load(groups + i) * out + output
        scale = tl.load(S + group, mask=present, other=1.0)
        zero = tl.load(Z + group, mask=present, other=0.0)
        w = tl.load(originals + at, mask=present, other=0.0)
        t = tl.load(targets + at, mask=present, other=0.0)
        g = tl.load(G + column * row_stride + i * column_stride, mask=(column > i) & (column < columns), other=0.0)
        t += tl.sum(E * g[:, None], axis=0)
        if SHIFTED:
            shift = tl.load(M + group, mask=present, other=0.0)
            t += shift
        # A plain / is not exact on a GPU. Within bounds before it is rounded: they are whole, so that nothing changes,
        # and what is rounded is small enough for it.
        level = tl.minimum(tl.maximum(tl.div_rn(t, scale), -zero), top - zero)
        level = (level + WHOLE) - WHOLE
        error = w - level * scale
        if SHIFTED:
            error += shift
        E = tl.where(column[:, None] == i, error[None, :], E)
        tl.store(targets + at, level + zero, mask=present)
        tl.store(errors + at, error, mask=present)
