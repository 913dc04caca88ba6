"""MaskedAdamW, MaskedSGD, MaskedLion: torch optimizers whose frozen elements keep their bits.

    optimizer = MaskedAdamW(model.parameters(), lr=1e-3, frozen={model.weight: frozen_mask})

Setting gradients to zero does not freeze a parameter: momentum and weight decay still move it. Here
a frozen element keeps its bits for every option, whatever its gradient holds, and it is left out of
gradient norms. With nothing frozen the trajectories are those of torch.optim up to rounding.
"""

from gose_kernels.masks import Importance
from gose_kernels.optim.clip import clip_grad_norm_
from gose_kernels.optim.masked import MaskedOptimizer
from gose_kernels.optim.optimizers import MaskedAdamW, MaskedLion, MaskedSGD

__all__ = [
    "Importance",
    "MaskedAdamW",
    "MaskedLion",
    "MaskedOptimizer",
    "MaskedSGD",
    "clip_grad_norm_",
]
