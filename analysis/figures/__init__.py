"""Figures: accuracy by method, learning curves, and the figures of the paper.

Enters: DataFrames of records. Leaves: PNG and PDF files.

Uses: tables, pld_ray.losses.
"""
