"""Statistics of scores: intervals and paired comparisons.

Enters: arrays of scores. Leaves: numbers. Knows nothing of trials.

Uses: nothing.
"""
