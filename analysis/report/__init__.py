"""The report: one page of all tables, figures and trials.

Enters: plans and their store. Leaves: one HTML file without links to a network, and Markdown.

Uses: records, tables, figures, landscapes, pld_ray.config, pld_ray.store, pld_ray.sweep.
"""
