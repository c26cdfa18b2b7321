"""Results from elsewhere: what is read, what is refused, and where they stand beside ours."""

import math

import pandas as pd
import pytest
import torch

from analysis.figures import methods, style
from analysis.records import frames, imported
from analysis.tables import comparison, comparison_printing
from pld_ray.config.planning import plan
from pld_ray.errors import InputError
from pld_ray.store.store import Store

TEXT = """
base: {data: digits, student: resnet8, teacher: resnet20, epochs: 2}
grid:
  loss: [ce, {name: kd, temperature: [1, 4]}, pld]
seeds: [0, 1]
"""
HEADER = "dataset,student,teacher,method,top1,std,n,source,note\n"
ROWS = """digits,resnet8,resnet20,pld,90.5,0.5,3,A paper,
digits,resnet8,resnet20,kd,88,,,A paper,long recipe
digits,resnet8,,CE,80,,,,
digits,resnet8,resnet20,New,91.25,0.25,5,A paper,
digits,resnet8,resnet56,pld,70,,,A paper,another teacher
cifar100,resnet8,resnet20,pld,71,,,A paper,other data
"""


@pytest.fixture
def results(experiment, tmp_path):
    """A plan, and a store in which PLD has finished with 90 and 93 %."""
    made, store = plan(experiment(TEXT)), Store(tmp_path / "results")
    for cell in made.cells:
        if cell.trial.loss.name == "pld":
            metrics = {"top1": 90.0 + 3 * cell.trial.seed, "teacher_top1": 97.0}
            store.log(cell.trial, [{"epoch": 1, "top1": 90.0, "train_loss": 1.0}])
            record = {"metrics": metrics, "seconds": {"seconds": 3.0}, "notes": []}
            store.finish(cell.trial, record, {"w": torch.zeros(1)})
    return made, store


def test_results_stand_beside_our_own(results, tmp_path):
    made, store = results
    (tmp_path / "papers.csv").write_text(HEADER + ROWS)
    table, unused = imported.read(tmp_path / "papers.csv")
    assert not unused and not imported.keep(table, "papers", store)
    assert imported.keep(table, "papers", store)  # a second import replaces the first
    frame = frames.frame(made, store)
    found = imported.beside(frame, store).set_index("method")
    # "kd" means no method here, because the experiment has two of them
    assert list(found.index) == ["PLD", "KD", "CE", "New"]
    assert found.loc["PLD", ["reported", "reported_std", "reported_n"]].tolist() == [90.5, 0.5, 3]
    assert found.loc["PLD", ["top1", "n", "difference"]].tolist() == [91.5, 2, 1]
    assert found.loc["PLD", "top1_std"] == pytest.approx(math.sqrt(4.5))  # of 90 and 93
    assert found.loc["CE", "source"] == "papers" and math.isnan(found.loc["CE", "difference"])
    text = comparison_printing.text(comparison.tables(frame, found.reset_index()), made.experiment)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert ["PLD", "A paper", "90.50 ± 0.50 (n = 3)", "91.50 ± 2.12", "+1.00"] in rows
    assert ["KD", "A paper (long recipe)", "88.00", "–", "–"] in rows
    own = comparison.tables(frame, found.reset_index())
    paths = comparison_printing.write(own, tmp_path / "out", made.experiment)
    kept = pd.read_csv(next(path for path in paths if path.name == "reported.csv"))
    assert kept["reported"].tolist() == [90.5, 88, 80, 91.25]


def test_the_figure_shows_them_as_diamonds(results, tmp_path):
    made, store = results
    (tmp_path / "papers.csv").write_text(HEADER + ROWS)
    imported.keep(imported.read(tmp_path / "papers.csv")[0], "papers", store)
    frame = frames.frame(made, store)
    done, colours = frame[frame["finished"]], style.method_colours(frame)
    (axis,) = methods.accuracy(done, colours, imported.beside(frame, store)).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["PLD", "KD", "CE", "New"]
    marks = [line.get_xydata()[0] for line in axis.lines if line.get_marker() == "D"]
    assert [(round(x, 2), y) for x, y in marks] == [
        (0.22, 90.5),
        (1, 88),
        (2, 80),
        (3, 91.25),
    ]
    many = "".join(f"digits,resnet8,resnet20,M{i},9{i},,,,\n" for i in range(7))
    (tmp_path / "papers.csv").write_text(HEADER + many)
    imported.keep(imported.read(tmp_path / "papers.csv")[0], "papers", store)
    (axis,) = methods.accuracy(done, colours, imported.beside(frame, store)).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["PLD"]  # too many others


def test_a_row_per_seed_is_averaged(tmp_path):
    path = tmp_path / "other_code.csv"
    path.write_text(
        "dataset,student,method,seed,top1,hours\n"
        "digits,resnet8,kd,0,90,1\ndigits,resnet8,kd,1,94,1\ndigits,resnet8,dist,0,80,1\n"
    )
    table, unused = imported.read(path)
    assert unused == ["hours"]
    by_method = table.set_index("method")
    assert by_method.loc["kd", ["top1", "std", "n"]].tolist() == [92, math.sqrt(8), 2]
    assert by_method.loc["dist", "n"] == 1 and math.isnan(by_method.loc["dist", "std"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("dataset,student,top1\nd,s,1\n", "the column 'method' is missing: expected"),
        (HEADER, "expected at least one row"),
        (HEADER + "digits,resnet8,,kd,7x,,,,\n", "line 2: top1 is '7x': expected a percentage"),
        (HEADER + "\ndigits,resnet8,,kd,,,,,\n", "line 3: top1 is '': expected a percentage"),
        (HEADER + "digits,resnet8,,kd,nan,,,,\n", "line 2: top1 is 'nan': expected a percentage"),
        (HEADER + "digits,resnet8,,kd,70,inf,,,\n", "line 2: std is 'inf': expected percentage"),
        (HEADER + "digits,resnet8,,kd,70,66,,,,\n", "line 2: 10 fields, and the header has 9"),
        (HEADER + "digits,resnet8,,Teacher,70,,,,\n", "line 2: teacher is ''"),
        ("dataset,student,method,top1, top1\nd,s,kd,9,9\n", "the column 'top1' is there twice"),
        (HEADER + "digits,resnet8,,kd,0.9,,,,\n", "no top1 is above 1: expected percentages"),
        (HEADER + "digits,resnet8,,kd,90,-1,,,\n", "line 2: std is '-1'"),
        (HEADER + "digits,resnet8,,kd,90,,1.5,,\n", "line 2: n is '1.5'"),
        (HEADER + "digits,,,kd,90,,,,\n", "line 2: student is '': expected a name"),
        (
            "dataset,student,method,top1,seed\nd,s,kd,9,0\nd,s,kd,8,0\n",
            "the seed 0 of kd and s is there twice",
        ),
        (
            "dataset,student,method,top1,seed\nd,s,kd,9,0\nd,s,kd,8,\n",
            "has the seed '': expected a seed in all rows or in none",
        ),
        ("dataset,student,method,top1,seed\nd,s,kd,9,x\n", "line 2: seed is 'x'"),
        ("dataset,student,method,top1,seed,n\nd,s,kd,9,0,3\n", "and no std and n beside it"),
        ("", "expected a CSV file with a header; it is empty"),
        ('dataset,student,method,top1\nd,"s', "expected a CSV file"),
        (b"\xff\xfe\x00", "expected a CSV file"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(content, said, tmp_path, cli):
    path = tmp_path / "papers.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        imported.read(path)
    assert said in str(error.value) and str(path) in str(error.value)
    ended = cli("import", "papers.csv", cwd=tmp_path)
    assert ended.returncode == 2 and said in ended.stderr and ended.stdout == ""
    assert not (tmp_path / "results").exists()


def test_the_command_imports_and_removes(results, tmp_path, cli):
    (tmp_path / "papers.csv").write_text(HEADER + ROWS)
    said = cli("import", "papers.csv", cwd=tmp_path).stdout
    assert "imported papers: 6 results from 2 sources" in said and "note" not in said
    shown = cli("tables", "small.yaml", cwd=tmp_path).stdout
    assert "A paper (long recipe)" in shown and "another teacher" not in shown
    assert "other data" not in shown
    assert "removed" in cli("import", "papers.csv", "--remove", cwd=tmp_path).stdout
    assert "A paper" not in cli("tables", "small.yaml", cwd=tmp_path).stdout
    ended = cli("import", "papers.csv", "--remove", cwd=tmp_path)
    assert ended.returncode == 2 and "nothing has been imported" in ended.stderr


@pytest.mark.parametrize(
    ("name", "shown"),
    [("hf:uoft-cs/cifar100", True), ("folder:/data/cifar100", True), ("folder:/cifar100/x", False)],
)
def test_a_dataset_is_found_by_the_last_part_of_its_name(results, name, shown):
    made, store = results
    row = dict.fromkeys(imported.COLUMNS, "") | {"dataset": "cifar100", "student": "resnet8"}
    row |= {"method": "PLD", "source": "x", "top1": 90.0, "std": math.nan, "n": math.nan}
    imported.keep(pd.DataFrame([row]), "x", store)
    frame = frames.frame(made, store).assign(dataset=name)
    assert len(imported.beside(frame, store)) == shown
    assert imported.beside(frame.assign(dataset=""), store).empty  # a miniature


def test_a_result_without_a_setting_is_not_put_into_one_of_several(results):
    made, store = results
    row = dict.fromkeys(imported.COLUMNS, "") | {"dataset": "digits", "student": "resnet8"}
    row |= {"method": "PLD", "source": "x", "top1": 90.0, "std": math.nan, "n": math.nan}
    imported.keep(pd.DataFrame([row, row | {"setting": "two"}]), "x", store)
    frame = frames.frame(made, store)
    frame["setting"] = ["one", "two"] * (len(frame) // 2)
    assert imported.beside(frame, store)["setting"].tolist() == ["two"]


def test_files_of_other_programs_are_read(tmp_path):
    path = tmp_path / "excel.csv"
    text = 'Dataset, Student ,Method,Top1,Source\r\n\r\ndigits,resnet8,KD, 90,"Tian, 2020"\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (row,) = imported.read(path)[0].to_dict("records")
    assert row["source"] == "Tian, 2020" and row["top1"] == 90 and row["student"] == "resnet8"


def test_only_what_is_known_is_said_of_several_pairs(experiment, tmp_path):
    text = TEXT.replace("teacher: resnet20, ", "").replace(
        "  loss:", "  teacher: [resnet20, resnet32]\n  loss:"
    )
    made, store = plan(experiment(text)), Store(tmp_path / "results")
    (tmp_path / "papers.csv").write_text(
        HEADER
        + "digits,resnet8,resnet32,P L D,90,,,A | B,\ndigits,resnet8,resnet32,teacher,97,,,A,\n"
    )
    imported.keep(imported.read(tmp_path / "papers.csv")[0], "papers", store)
    frame = frames.frame(made, store)
    frame["teacher_top1"] = 98.0
    found = imported.beside(frame, store)
    assert found["teacher"].tolist() == ["resnet32", "resnet32"]
    assert found["method"].tolist() == ["PLD", "Teacher"] and found["difference"].iloc[1] == 1
    own = comparison.tables(frame, found)
    lines = comparison_printing.text(own, made.experiment).splitlines()
    (line,) = [line for line in lines if "A \\| B" in line]  # it does not end the cell
    assert line.startswith("| resnet32 → resnet8 | PLD")
    folder = tmp_path / "out"
    comparison_printing.write(own, folder, made.experiment)
    assert (folder / "reported.csv").exists()
    comparison_printing.write(comparison.tables(frame), folder, made.experiment)
    assert not (folder / "reported.csv").exists()  # it was removed from the storage


def test_methods_are_found_by_the_name_of_their_loss_in_a_plugin(experiment, tmp_path):
    (tmp_path / "own.py").write_text(
        "from pld_ray import DistillationLoss, register_loss\n"
        "@register_loss('mine', label='Mine $x$')\nclass Mine(DistillationLoss):\n"
        "    def losses(self, student, teacher, labels, kept):\n"
        "        return (student - teacher).square().sum(1)\n"
    )
    made = plan(experiment("plugins: [own.py]\n" + TEXT.replace("pld]", "mine]")))
    store = Store(tmp_path / "results")
    row = dict.fromkeys(imported.COLUMNS, "") | {"dataset": "Digits", "student": "resnet8"}
    row |= {"method": "MINE", "source": "x", "top1": 90.0, "std": math.nan, "n": math.nan}
    imported.keep(pd.DataFrame([row, row | {"method": "$\\ours$"}]), "x", store)
    frame = frames.frame(made, store)
    found = imported.beside(frame, store)
    assert found["method"].tolist() == ["Mine $x$", "$\\ours$"]
    done = frame.assign(top1=80.0, finished=True)
    figure = methods.accuracy(done, style.method_colours(done), found)
    style.save(figure, tmp_path / "figure")  # a dollar sign begins no formula


def test_what_is_not_known_is_told(tmp_path, cli):
    (tmp_path / "papers.csv").write_text(HEADER + "digits,resnet-20,,kd,90,,,,\n")
    said = cli("import", "papers.csv", cwd=tmp_path).stdout
    assert "note: networks that are neither timm's nor ours: 'resnet-20' (did you mean" in said
    (tmp_path / "a b.csv").write_text(HEADER + "digits,resnet20,,kd,90,,,,\n")
    ended = cli("import", "a b.csv", cwd=tmp_path)
    assert ended.returncode == 2 and "the name of the file is 'a b'" in ended.stderr


def test_a_damaged_file_of_the_storage_is_told(results):
    made, store = results
    store.files.write("imported/x.csv", b"dataset,student\nd,s\n")
    with pytest.raises(InputError, match="imported/x.csv: expected what `pld-ray import` writes"):
        imported.beside(frames.frame(made, store), store)
