"""The command `pld-ray`: one module per group of commands.

Enters: arguments of the command line. Leaves: text, files, and an exit code. Heavy modules are
imported only when a command needs them, so that `pld-ray --help` is fast.

Uses: losses, config, store, data, models, distill, sweep, api, analysis.
"""
