"""Case I of seed N: one call of one op."""

from __future__ import annotations

import torch

from tests.soak import products, routing
from tests.soak.draw import Draw

_OPS = (products.expert_mlp, products.expert_mlp, products.grouped_gemm, routing.moe, routing.route)


def run_case(seed: int, case: int) -> str:
    """The op that case was of; AssertionError if a result is wrong."""
    draw, threads = Draw(seed, case), torch.get_num_threads()
    op = draw.random.choice(_OPS)
    torch.set_num_threads(1)
    try:
        op(draw)
    except Exception as error:
        error.add_note(f"python -m tests.soak --seed {seed} --case {case}")
        raise
    finally:
        torch.set_num_threads(threads)
    return op.__name__
