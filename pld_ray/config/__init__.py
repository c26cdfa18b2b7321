"""Settings: trials, experiments, search spaces, and the YAML files that hold them.

Enters: YAML files or plain values. Leaves: validated `Trial`s, and a `Plan` of unique trials.
Nothing here imports torch or Ray, so that a plan is made in well under a second.

Uses: losses.
"""
