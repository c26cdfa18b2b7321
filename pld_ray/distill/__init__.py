"""Distillation: the core of a training step, the training loop, the teacher and its bank.

Enters: a trial, its images and its store; or modules and loaders of the user's own. Leaves: trained
weights and metrics. Nothing here knows Ray.

Uses: losses, config, store, data, models.
"""
