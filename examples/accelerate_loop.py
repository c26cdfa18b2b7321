"""A student trained with Hugging Face Accelerate, on one device or several.

pip install accelerate
accelerate launch examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import loaders, network

from pld_ray import CELoss, Distiller, DISTLoss, evaluate, fit


def main(epochs: int = 20) -> float:
    """Run the example and return the accuracy of the student, in [0, 1]."""
    accelerator = Accelerator()
    set_seed(0)
    all_images, few_images, test_images = loaders()
    teacher = network("resnet20")
    fit(Distiller(teacher, loss=CELoss()), all_images, epochs=max(1, epochs // 4), lr=3e-3)

    student = network("resnet8")
    distiller = Distiller(student, teacher, loss=DISTLoss(temperature=4.0))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    distiller, optimizer, few_images = accelerator.prepare(distiller, optimizer, few_images)
    for _ in range(epochs):
        distiller.train()
        for images, labels in few_images:
            optimizer.zero_grad()
            accelerator.backward(distiller(images, labels))
            optimizer.step()
    accuracy = evaluate(student, test_images)
    accelerator.print(f"student: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
