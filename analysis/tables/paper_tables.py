"""The tables of the paper, each as a short declaration over the records of one experiment."""

from __future__ import annotations

from dataclasses import dataclass

from pld_ray.config.experiment import experiments_folder

METRICS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "kl_teacher_student": "KL(T‖S), nats",
    "train_minutes": "minutes",
}
TEACHER = "Teacher"


@dataclass(frozen=True)
class PaperTable:
    """Declaration of one table of the paper.

    Attributes:
        numbers: Number of the table in the paper, or "5 and 8" for two tables in one.
        title: Title of the table.
        experiment: Name of the experiment that regenerates the table.
        rows: What the rows are: pair, method, epochs, optimizer or metric.
        columns: What the columns are: pair, method, epochs, optimizer or metric.
        metrics: Names of the metrics in METRICS.
        gains: Losses over which PLD's advantage is shown, in the first metric.
    """

    numbers: str
    title: str
    experiment: str
    rows: str
    columns: str
    metrics: tuple[str, ...] = ("top1",)
    gains: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the table's files, such as table-2 or table-5-8."""
        return f"table-{self.numbers.replace(' and ', '-')}"

    @property
    def number(self) -> int:
        """Number of the table in reported.csv. Table 5 is part of Table 8."""
        return int(self.numbers.split()[-1])


BOTH = ("dist", "kd")
TABLES = (
    PaperTable("1", "Methods on CIFAR-100", "cifar100_methods", "method", "pair", gains=BOTH),
    PaperTable("2", "Homogeneous pairs", "homogeneous_pairs", "pair", "method", gains=BOTH),
    PaperTable(
        "3", "Heterogeneous teachers", "heterogeneous_teachers", "pair", "method", gains=BOTH
    ),
    PaperTable("4", "Longer training", "longer_training", "method", "epochs", gains=BOTH),
    PaperTable(
        "5 and 8", "The weight of cross-entropy", "ce_weight", "method", "metric", ("top1", "top5")
    ),
    PaperTable(
        "6", "The weights of the ranking", "pld_weights", "method", "metric", ("top1", "top5")
    ),
    PaperTable("9", "Optimizers", "optimizers", "optimizer", "method", gains=BOTH),
    PaperTable("10", "Logit standardization", "logit_standardization", "method", "metric"),
    PaperTable("11", "Divergences under KD", "divergences", "method", "metric"),
    PaperTable(
        "12",
        "Alignment with the teacher",
        "teacher_alignment",
        "pair",
        "method",
        ("kl_teacher_student",),
    ),
    PaperTable("13", "Training time", "runtime", "method", "pair", ("train_minutes",)),
)


def title(table: PaperTable, miniature: bool) -> str:
    """Return the heading of the table, such as "Table 2: Homogeneous pairs"."""
    plural = "Tables" if "and" in table.numbers else "Table"
    return f"{plural} {table.numbers}: {table.title}" + (" (miniature)" if miniature else "")


def experiments() -> list[str]:
    """Return the names of all shipped experiments: the paper's tables in order, then the others."""
    shipped = sorted(path.stem for path in experiments_folder().glob("*.yaml"))
    return list(dict.fromkeys([*(table.experiment for table in TABLES), *shipped]))


def of_experiment(name: str) -> list[PaperTable]:
    """Return the tables that an experiment or its miniature regenerates."""
    return [table for table in TABLES if table.experiment == name.removesuffix("-smoke")]
