"""A student in a loop with timm's parts: optimizer, schedule, clipping and averaged weights.

python examples/timm_loop.py
"""

import torch
from digits import loaders, network
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad

from pld_ray import CELoss, Distiller, KDLoss, evaluate, fit


def main(epochs: int = 20) -> float:
    """Run the example and return the accuracy of the averaged student, in [0, 1]."""
    torch.manual_seed(0)
    all_images, few_images, test_images = loaders()
    teacher = network("resnet20")
    fit(Distiller(teacher, loss=CELoss()), all_images, epochs=max(1, epochs // 4), lr=3e-3)

    student = network("resnet8")
    distiller = Distiller(student, teacher, loss=KDLoss(temperature=4.0))
    optimizer = create_optimizer_v2(student, "adamw", lr=3e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=epochs,
        updates_per_epoch=len(few_images),
        step_on_epochs=False,
    )
    averaged, update = ModelEmaV3(student, decay=0.9), 0
    for _ in range(epochs):
        distiller.train()
        for images, labels in few_images:
            optimizer.zero_grad()
            distiller(images, labels).backward()
            dispatch_clip_grad(student.parameters(), 5.0)
            optimizer.step()
            update += 1
            averaged.update(student, step=update)
            schedule.step_update(update)
    accuracy = evaluate(averaged.module, test_images)
    print(f"student: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
