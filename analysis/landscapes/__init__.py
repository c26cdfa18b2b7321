"""Loss landscapes over student logits and around trained weights, and the sharpness of minima.

Enters: finished trials. Leaves: figures and tables of sharpness. This is the only part of
`analysis` that evaluates networks.

Uses: records, tables, figures, pld_ray.losses, pld_ray.config, pld_ray.store, pld_ray.data,
pld_ray.models, pld_ray.distill.
"""
