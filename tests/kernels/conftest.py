"""Triton kernels run here only in a process that began with TRITON_INTERPRET=1:

TRITON_INTERPRET=1 python -m pytest tests/kernels -k triton
"""

from __future__ import annotations

from gose_kernels.backends import triton_interprets

collect_ignore: list[str] = []
if triton_interprets():
    from tests import triton_interpreter

    triton_interpreter.repair()
else:
    collect_ignore.append("test_triton_interpreter.py")
