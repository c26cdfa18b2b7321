"""Storage: files that appear whole or not at all, trials, teacher banks, and claims on trials.

Enters: settings, metrics, weights, logits. Leaves: the same, checked by a checksum. Only this
package knows paths and formats.

Uses: config.
"""
