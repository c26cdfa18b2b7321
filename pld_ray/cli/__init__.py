"""The command `pld-ray`: one module per group of commands.

Enters: arguments of the command line. Leaves: text, files, and an exit code. Heavy imports wait
until a command needs them.

Uses: losses, config, store, data, models, distill, sweep, analysis.
"""
