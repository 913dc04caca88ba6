"""Triton kernels with their launchers, one file per op; importing a file imports triton."""
