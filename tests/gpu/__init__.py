"""The GPU kernels without a GPU: their PTX in the machine of tests/ptx, their sources under g++
(csrc/emulate), their compiler reports against tests/gpu/budget.json."""
