"""Figures: accuracy by method, learning curves, what a grid varies, and the figures of the paper.

Enters: DataFrames of records. Leaves: PNG and PDF files.

Uses: records, statistics, tables, pld_ray.losses, pld_ray.config.
"""
