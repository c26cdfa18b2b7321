"""Storage: atomic files, trials, teacher banks, and the claims of drivers on trials.

Enters: settings, metrics, weights, logits. Leaves: the same data, verified by a checksum. Only this
package knows paths and formats.

Uses: config.
"""
