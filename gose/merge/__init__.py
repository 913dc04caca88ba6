"""Merging: how the updates of sites become one set of parameters."""

from gose.merge.curvature import MERGES, SENDS_FISHER, Update, fisher_merge, mean_merge

__all__ = ["MERGES", "SENDS_FISHER", "Update", "fisher_merge", "mean_merge"]
