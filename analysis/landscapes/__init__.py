"""Loss landscapes: over student logits, and around trained weights with their sharpness.

Enters: finished trials. Leaves: figures and tables of sharpness. The only room of `analysis` that
evaluates networks.

Uses: records, tables, figures, pld_ray.losses, pld_ray.config, pld_ray.store, pld_ray.data,
pld_ray.models, pld_ray.distill.
"""
