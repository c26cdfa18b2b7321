"""Tables of one experiment, tables of the paper with its reported numbers, and best settings.

Enters: DataFrames of records. Leaves: Markdown, CSV, LaTeX and HTML.

Uses: records, statistics, pld_ray.losses, pld_ray.config, pld_ray.store, pld_ray.sweep.
"""
