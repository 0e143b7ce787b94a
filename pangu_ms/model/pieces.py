"""In how large pieces some formulas work, where estimates must know it too. Needs no MindSpore."""

BLOCK = 64   # rows of one expert that `experts_grouped` computes together
ROWS = 1024  # of the head's output that `streamed_cross_entropy` has at once
