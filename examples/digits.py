"""Distil a small network on handwritten digits with modules and loaders of your own.

    python examples/digits.py

It trains a teacher and a student with `fit`, then a student in a plain PyTorch loop, and saves
the first one. It takes about a minute on two CPU cores.
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from pld_ray import CELoss, Distiller, PLDLoss, evaluate, fit, save


def loaders(students: int = 200) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Loaders of all training digits, of the student's share of them, and of the test digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)
    whole, share, test = (
        TensorDataset(images[rows], labels[rows])
        for rows in (slice(1437), slice(students), slice(1437, None))
    )
    shuffled = {"batch_size": 32, "shuffle": True, "drop_last": True}
    return DataLoader(whole, **shuffled), DataLoader(share, **shuffled), DataLoader(test, 360)


def network(name: str) -> torch.nn.Module:
    """A network for grey images and ten classes."""
    return timm.create_model(name, num_classes=10, in_chans=1)


def main(epochs: int = 20, folder: str = "digits-student") -> float:
    """Run the example and return the accuracy of the saved student, in [0, 1]."""
    torch.manual_seed(0)
    all_images, few_images, test_images = loaders()

    teacher = network("resnet20")
    fit(Distiller(teacher, loss=CELoss()), all_images, epochs=max(1, epochs // 4), lr=3e-3)
    print(f"teacher: {evaluate(teacher, test_images):.1%}")

    student = network("resnet8")
    distiller = Distiller(student, teacher, loss=PLDLoss(temperature=4.0))
    history = fit(distiller, few_images, epochs=epochs, val_loader=test_images, lr=3e-3)
    print(history[["epoch", "train_loss", "top1"]].tail(3).to_string(index=False))
    save(student, folder)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    accuracy = evaluate(again, test_images)
    print(f"student: {accuracy:.1%}, loaded from {folder}")

    # The same core in a loop of your own: the distiller is a torch module that returns a loss.
    other = network("resnet8")
    distiller = Distiller(other, teacher, loss=PLDLoss(temperature=4.0))
    optimizer = torch.optim.AdamW(other.parameters(), lr=3e-3)
    for _ in range(epochs):
        distiller.train()
        for images, labels in few_images:
            optimizer.zero_grad()
            distiller(images, labels).backward()
            optimizer.step()
    print(f"student of a plain loop: {evaluate(other, test_images):.1%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="Epochs of each student.")
    parser.add_argument("--folder", default="digits-student", help="Where to save the student.")
    main(**vars(parser.parse_args()))
