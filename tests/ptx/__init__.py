"""A machine that executes compiled PTX on NumPy arrays, and faults where a GPU would go wrong.

It proves what is *emitted*: layouts, fragments, masks, barriers, waits, bounds; and it counts
instructions, bytes, sectors, bank conflicts and tensor-core operations. It knows nothing of ptxas,
of the hardware's memory model between blocks, of rounding inside ex2.approx and its kind (computed
exactly here), or of time.
"""
