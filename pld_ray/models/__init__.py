"""Networks: the CIFAR networks of the literature, timm's by name, their features, their export.

Enters: the name and arguments of a network. Leaves: a `torch.nn.Module`, and files that timm or
ONNX runtimes load.

Uses: losses, config, store.
"""

from pld_ray.models import networks, reused  # noqa: F401 - registers them with timm
