"""Tables: an experiment's own, the paper's with reported numbers, and the best settings.

Enters: DataFrames of records. Leaves: Markdown, CSV, LaTeX and HTML.

Uses: records, statistics, pld_ray.losses, pld_ray.config, pld_ray.store, pld_ray.sweep.
"""
