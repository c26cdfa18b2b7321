"""Data: datasets by name, and the stream of augmented batches that trials see.

    sources (a folder, a table, an array) -> datasets (fingerprint, limit and holdout)
        -> encoded, image_files (decoded when a batch needs them)
        -> augmentation, workers (torchvision), mixing -> stream (batches on a device)

Enters: the `data` settings of a trial. Leaves: `Images` (uint8 arrays or encoded files), and
batches of normalised images on a device. Everything random is a function of (seed, epoch, index).

Uses: config.
"""
