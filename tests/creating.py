"""What a spawned process runs; apart from the tests, whose imports take seconds."""

from pld_ray.store.files import Files


def create(root, path, word, start, won):
    files = Files(root)
    start.wait()
    won.put((files.create(path, word * 1000), word))
