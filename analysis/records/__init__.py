"""Read the records of trials into DataFrames and export them for other programs.

Enters: a plan and its store. Leaves: one row per trial or epoch.

Uses: pld_ray.losses, pld_ray.config, pld_ray.store.
"""
