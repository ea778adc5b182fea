"""A process that compiles the Triton kernel for GPUs that need not be there.

    python -m tests.models.compiling <file.json>

Writes for each architecture its PTX and the size of its machine code.
"""

import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.kernels.feedback_triton import OUTPUTS
from models.kernels.feedback_triton import round_columns_of_some_outputs as kernel
from models.quantize.feedback import FEW_COLUMNS

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200


def main(path: Path) -> None:
    types = dict.fromkeys(("originals", "targets", "errors", "G", "S", "Z", "M"), "*fp32") | {"groups": "*i32"}
    types |= dict.fromkeys(("columns", "out", "column_stride", "top"), "i32")
    compiled = {}
    for shifted in (True, False):
        fixed = {"SHIFTED": shifted, "COLUMNS": FEW_COLUMNS, "OUTPUTS": OUTPUTS, "row_stride": 1}
        signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
        for architecture in ARCHITECTURES:
            made = triton.compile(
                ASTSource(kernel, signature, fixed),
                target=GPUTarget("cuda", architecture, 32),
                options={"num_warps": 1, "enable_fp_fusion": True},
            )
            name = f"{architecture}, {'shifted' if shifted else 'not shifted'}"
            compiled[name] = {"ptx": made.asm["ptx"], "cubin_bytes": len(made.asm["cubin"])}
    path.write_text(json.dumps(compiled))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
