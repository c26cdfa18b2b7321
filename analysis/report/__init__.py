"""The report: one page with all tables, figures and trials.

Enters: plans and their store. Leaves: one self-contained HTML file, and the same as Markdown.

Uses: records, statistics, tables, figures, landscapes, pld_ray.config, pld_ray.store,
pld_ray.sweep.
"""
