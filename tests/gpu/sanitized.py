"""Kernels compiled with AddressSanitizer: `python -m tests.gpu.sanitized FOLDER OP|shared|tensor`
runs every case of an op, or one planted overflow of a shared array or of a tensor."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from tests.gpu import cuda_host
from tests.gpu.kept import Kept
from tests.gpu.ops import OPS

_FLAGS = ("-fsanitize=address", "-fno-omit-frame-pointer")


def main(folder: Path, what: str) -> int:
    if what in ("shared", "tensor"):
        source = Path(__file__).parent / "faulty.cu"
        call = cuda_host.OnEmulator(cuda_host.compile_emulated(source, folder, flags=_FLAGS))
        out = torch.zeros(63 if what == "tensor" else 64)
        rows = 4 if what == "shared" else 0
        call("entropy", "EntropyParams", {"out": out}, rows=rows, C=1)
        return 0
    compile_ = partial(cuda_host.compile_emulated, flags=_FLAGS)
    libraries = Kept("sanitized", compile_, cuda_host.emulated_library)
    op, count = OPS[what], 0
    call = cuda_host.OnEmulator(libraries[op.source])
    for dtype in op.dtypes:
        for _, args in op.cases(dtype):
            op.cuda(call, *args)
            count += 1
    print(f"{count} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
