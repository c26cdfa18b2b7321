"""Statistics of scores: confidence intervals and paired comparisons.

Enters: arrays of scores. Leaves: numbers. This package does not depend on trials.

Uses: nothing.
"""
