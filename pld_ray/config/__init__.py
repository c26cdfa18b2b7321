"""Settings: trials, experiments, search spaces, and the YAML files that hold them.

Enters: YAML files or plain values. Leaves: validated `Trial`s, and a `Plan` of unique trials.
No module of this package imports torch or Ray, so a plan is made in well under a second.

Uses: losses.
"""
