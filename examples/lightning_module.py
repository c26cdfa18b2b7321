"""A student trained by PyTorch Lightning: a LightningModule around a `Distiller`.

pip install lightning
python examples/lightning_module.py
"""

import lightning
import torch
from digits import loaders, network

from pld_ray import CELoss, Distiller, DKDLoss, evaluate, fit


class Distillation(lightning.LightningModule):
    """Trains the student of a distiller; the teacher stays frozen."""

    def __init__(self, distiller: Distiller, lr: float) -> None:
        super().__init__()
        self.distiller, self.lr = distiller, lr

    def training_step(self, batch, index):
        """Return the loss of a batch (images, labels)."""
        loss = self.distiller(*batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        """Log the accuracy of a batch, in percent."""
        images, labels = batch
        right = self.distiller.student(images).argmax(1) == labels
        self.log("top1", 100 * right.float().mean(), prog_bar=True)

    def configure_optimizers(self):
        """Return the optimizer of the student."""
        return torch.optim.AdamW(self.distiller.student.parameters(), lr=self.lr)


def main(epochs: int = 20) -> float:
    """Run the example and return the accuracy of the student, in [0, 1]."""
    lightning.seed_everything(0)
    all_images, few_images, test_images = loaders()
    teacher = network("resnet20")
    fit(Distiller(teacher, loss=CELoss()), all_images, epochs=max(1, epochs // 4), lr=3e-3)

    student = network("resnet8")
    module = Distillation(Distiller(student, teacher, loss=DKDLoss(temperature=4.0)), lr=3e-3)
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, few_images, test_images)
    accuracy = evaluate(student, test_images)
    print(f"student: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
