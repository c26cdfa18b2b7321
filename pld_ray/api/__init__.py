"""What the command line and Python users call: open an experiment, run it, and look at the results.

Enters: a YAML file, the name of an experiment or an `Experiment`, and a storage. Leaves: a plan, or
`Results` with tables, figures and students. Heavy modules are imported only when a function needs
them.

Uses: losses, config, store, data, models, distill, sweep, analysis.
"""
