"""Results of the literature: what the data file holds, and where it stands beside ours."""

import csv
import math

import pandas as pd
import pytest
import timm
import torch
from test_report import ENVIRONMENT, Page

import pld_ray.models  # noqa: F401 - registers our networks
from analysis.records import frames, imported
from analysis.report import page
from analysis.tables import literature, literature_printing, rendering
from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.losses import REGISTRY
from pld_ray.store.store import Store

TEXT = """
title: Three pairs
base: {data: cifar100, epochs: 2}
grid:
  teacher, student:
    - [wrn_40_2, wrn_16_2]
    - [resnet56, resnet20]
    - [resnet50_cifar, mobilenetv2_cifar]
  loss: [ce, kd, pld]
seeds: [0, 1]
"""
SCORES = {  # last and best epoch of seeds 0 and 1; PLD has one seed on the last pair
    ("wrn_16_2", "ce"): [(73, 74), (75, 75)],
    ("wrn_16_2", "kd"): [(75, 75), (76, 77)],
    ("wrn_16_2", "pld"): [(75, 77), (75.5, 76)],
    ("resnet20", "ce"): [(69, 69.5), (69, 69.5)],
    ("resnet20", "kd"): [(70, 71), (72, 72)],
    ("resnet20", "pld"): [(72, 72), (74, 74)],
    ("mobilenetv2_cifar", "ce"): [(65, 65), (66, 66)],
    ("mobilenetv2_cifar", "kd"): [(67, 67.5), (68, 68)],
    ("mobilenetv2_cifar", "pld"): [(70, 70.5)],
}
WRN = ("cifar100", "wrn_40_2", "wrn_16_2")
MOBILE = ("cifar100", "resnet50_cifar", "mobilenetv2_cifar")
HEADER = "dataset,teacher,student,method,top1,std,n,source,epoch\n"


@pytest.fixture
def results(experiment, tmp_path):
    """A plan, and a store with the trials of SCORES."""
    made, store = plan(experiment(TEXT)), Store(tmp_path / "results")
    for cell in made.cells:
        scores = SCORES[cell.trial.student.name, cell.trial.loss.name]
        if cell.trial.seed < len(scores):
            last, best = map(float, scores[cell.trial.seed])
            metrics = {"top1": last, "teacher_top1": 80.0}
            store.log(cell.trial, [{"epoch": 1, "top1": last, "train_loss": 1.0}])
            record = {"metrics": metrics, "best_top1": best, "seconds": {"seconds": 3.0}}
            record |= {"notes": [], "environment": ENVIRONMENT}
            store.finish(cell.trial, record, {"w": torch.zeros(1)})
    return made, store


@pytest.fixture
def found(results):
    return literature.compare(frames.frame(*results))


def by_method(found, kind):
    return found.methods[found.methods["kind"] == kind].set_index("method")


# ---------------------------------------------------------------- the data file


def rows():
    with literature.FILE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def test_every_row_of_the_data_file_is_read():
    written = rows()
    table = literature.shipped()
    kept = table[~table["method"].isin(["Teacher", "ce"])]
    fields = ["source", "file", "dataset", "teacher", "student", "method", "epoch", "note"]
    expected = {(*(row[name] for name in fields), float(row["top1"])) for row in written}
    assert len(written) == len(kept) == 1145
    assert set(kept[[*fields, "top1"]].itertuples(index=False, name=None)) == expected
    assert all(None not in row and None not in row.values() for row in written)
    assert literature.FILE.read_bytes().count(b"\r\n") == 1146


def test_every_name_of_the_data_file_is_known():
    written = rows()
    methods = {row["method"] for row in written}
    assert methods <= REGISTRY.keys() | literature.LABELS.keys()
    assert len({literature.label(name) for name in methods}) == len(methods)
    networks = {
        row[n]
        for row in written
        for n in ("teacher", "student")
        if row["dataset"] != "tiny_imagenet"
    }
    unknown = {name for name in networks if not timm.is_model(name)}
    assert unknown == {"wrn_28_4", "wrn_28_2", "wrn_16_4", "pyramid_110", "pyramid_200"}
    epochs = {row["source"]: row["epoch"] for row in written if row["epoch"]}
    assert epochs == {
        "HobbitLong/RepDistiller": "last",
        "megvii-research/mdistiller": "best",
        "sunshangquan/logit-standardization-KD": "best",
    }


@pytest.mark.parametrize(
    ("source", "teacher", "student", "method", "top1"),
    [
        ("HobbitLong/RepDistiller", "resnet56", "resnet20", "kd", 70.66),
        ("HobbitLong/RepDistiller", "resnet110", "resnet20", "kd", 70.67),
        ("zhengli97/CTKD", "resnet110", "resnet20", "kd", 70.66),
        ("HobbitLong/RepDistiller", "resnet32x4", "resnet8x4", "crd", 75.51),
        ("HobbitLong/RepDistiller", "wrn_40_2", "wrn_16_2", "Teacher", 75.61),
        ("HobbitLong/RepDistiller", "wrn_40_2", "wrn_16_2", "ce", 73.26),
        ("megvii-research/mdistiller", "wrn_40_2", "wrn_16_2", "dkd", 76.23),
        ("megvii-research/mdistiller", "resnet32x4", "shufflenetv2", "dkd", 77.07),
        ("hunto/DIST_KD", "resnet50_cifar", "mobilenetv2_cifar", "dist", 68.66),
    ],
)
def test_known_results(source, teacher, student, method, top1):
    table = literature.shipped()
    at = (table["source"] == source) & (table["teacher"] == teacher)
    at &= (table["student"] == student) & (table["method"] == method)
    assert table.loc[at, "top1"].tolist() == [top1] and (table.loc[at, "apart"] == "").all()


def test_a_method_that_does_not_exist_on_a_pair_has_no_number():
    table = literature.shipped()
    fsp = table[(table["method"] == "fsp") & (table["source"] == "HobbitLong/RepDistiller")]
    assert len(fsp) == 6 and "wrn_40_1" not in set(fsp["student"]) and fsp["top1"].min() > 60


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ("ce", "ce"),
        ("kd", "kd"),
        ("{name: kd, standardize: both}", "ls_kd"),
        ("{name: kd, standardize: teacher}", ""),
        ("{name: kd, divergence: reverse_kl}", ""),
        ("{name: dkd, standardize: both}", "ls_dkd"),
        ("{name: pld, temperature: 4}", "pld"),
    ],
)
def test_settings_decide_which_method_of_the_literature_a_loss_is(loss, name, experiment):
    made = plan(experiment(TEXT.replace("[ce, kd, pld]", f"[{loss}]")))
    assert {literature.method_name(cell.trial) for cell in made.cells} == {name}


def test_kd_with_dot_is_a_method_of_the_literature(tmp_path):
    made = plan(load_experiment("benchmark_dot"))
    named = {(c.trial.optimizer.name, literature.method_name(c.trial)) for c in made.cells}
    assert named == {("momentum", "kd"), ("dot", "dot")}
    dkd = plan(load_experiment("benchmark_dot", {"loss.name": "dkd"})).cells[3].trial
    assert (dkd.optimizer.name, literature.method_name(dkd)) == ("dot", "")
    found = literature.compare(frames.frame(made, Store(tmp_path))).cells
    rows = found[found["name"] == "dot"].dropna(subset="low").set_index("student")["low"]
    assert rows.to_dict() == {"resnet8x4": 75.12, "vgg8_cifar": 73.77, "shufflenetv2": 75.55}


@pytest.mark.parametrize(
    ("network", "family"),
    [
        ("resnet32x4", "resnet"),
        ("resnet50_cifar", "resnet"),
        ("wrn_40_2", "wrn"),
        ("vgg13_cifar", "vgg"),
        ("mobilenetv2_cifar", "mobilenetv"),
        ("shufflenetv1", "shufflenetv"),
        ("hf-hub:timm/ViT_base", "vit"),
    ],
)
def test_families_are_the_letters_at_the_start(network, family):
    assert literature.family(network) == family


# ---------------------------------------------------------------- beside ours


def test_cells_by_hand(found):
    cells = found.cells.set_index(literature.CELL)
    assert list(dict.fromkeys(found.cells["method"])) == ["Teacher", "CE", "KD", "PLD"]
    kd = cells.loc[(*WRN, "KD")]
    assert kd[["last", "last_n", "best", "best_n", "planned"]].tolist() == [75.5, 2, 76, 2, 2]
    assert kd["last_std"] == pytest.approx(math.sqrt(0.5))
    # RepDistiller, mdistiller, logit-standardization-KD, CTKD and EDKD; SSKD and SAKD stand apart
    assert kd[["low", "high", "sources", "apart"]].tolist() == [74.92, 74.92, 5, 2]
    assert cells.loc[(*WRN, "Teacher")][["last", "low", "high"]].tolist() == [80, 75.61, 75.61]
    assert cells.loc[(*MOBILE, "PLD")][["last", "last_n", "planned", "sources"]].tolist() == [
        70,
        1,
        2,
        0,
    ]
    kinds = found.cells.drop_duplicates("student").set_index("student")["kind"]
    assert kinds.to_dict() == {
        "wrn_16_2": "homogeneous",
        "resnet20": "homogeneous",
        "mobilenetv2_cifar": "heterogeneous",
    }


def test_ranges_are_those_of_the_rows_of_the_file(experiment, tmp_path):
    """Each range is compared with one that plain loops find in the file."""
    text = TEXT.replace("[ce, kd, pld]", "[kd, dkd, dist, at, rkd, vid]")
    records = frames.frame(plan(experiment(text)), Store(tmp_path / "none"))
    cells = literature.compare(records, everything=True).cells
    labels = {literature.label(row["method"]): row["method"] for row in rows()}
    checked = 0
    for cell in cells.to_dict("records"):
        if cell["method"] not in labels:
            continue
        fits = [
            row
            for row in rows()
            if [row[name] for name in literature.PAIR] == [cell[name] for name in literature.PAIR]
            and row["method"] == labels[cell["method"]]
        ]
        counted = [float(row["top1"]) for row in fits if not row["apart"]]
        assert cell["apart"] == sum(row["apart"] != "" for row in fits)
        assert cell["sources"] == len({row["source"] for row in fits if not row["apart"]})
        if counted:
            assert (cell["low"], cell["high"]) == (min(counted), max(counted))
            checked += 1
    assert checked > 100


def test_a_known_misprint_is_shown_and_not_counted(found):
    cells = found.cells.set_index(literature.CELL)
    assert cells.loc[(*MOBILE, "KD")][["low", "high"]].tolist() == [67.35, 67.35]
    at = (found.sources["student"] == MOBILE[2]) & (found.sources["reported"] == 67.65)
    (row,) = found.sources[at].to_dict("records")
    assert row["apart"].startswith("probably a misprint") and row["method"] == "KD"
    assert "apart: probably a misprint" in literature_printing.text_sources(found)


def test_ranks_by_hand(found):
    """wrn: KD 75.5, PLD 75.25, CE 74, and by the best epoch PLD 76.5, KD 76; resnet: PLD, KD, CE.

    On the heterogeneous pair, a trial of PLD is missing.
    """
    own = by_method(found, "homogeneous")
    assert own.loc[["CE", "KD", "PLD"], "rank_last"].tolist() == [3, 1.5, 1.5]
    assert own.loc[["CE", "KD", "PLD"], "rank_best"].tolist() == [3, 2, 1]
    assert own.loc["KD", ["pairs", "ranked_last"]].tolist() == [2, 2]
    other = by_method(found, "heterogeneous")
    assert other["rank_last"].isna().all() and (other["ranked_last"] == 0).all()
    both = by_method(found, "all")
    assert both.loc["PLD", ["rank_last", "ranked_last", "pairs"]].tolist() == [1.5, 2, 3]


def test_gains_by_hand(found):
    own = by_method(found, "homogeneous")
    assert own.loc["PLD", "over_kd_last"] == pytest.approx((-0.25 + 2) / 2)
    assert own.loc["PLD", "over_kd_best"] == pytest.approx((0.5 + 1.5) / 2)
    assert own.loc["PLD", "over_ce_last"] == pytest.approx((1.25 + 4) / 2)
    assert own.loc["CE", "over_kd_last"] == pytest.approx((-1.5 - 2) / 2)
    assert math.isnan(own.loc["KD", "over_kd_last"]) and own.loc["KD", "over_kd_last_pairs"] == 0
    other = by_method(found, "heterogeneous")
    assert other.loc["KD", ["over_ce_last", "over_ce_last_pairs"]].tolist() == [2, 1]
    assert other.loc["PLD", "over_ce_last_pairs"] == 0  # one of its trials is missing
    both = by_method(found, "all")
    assert both.loc["CE", "over_kd_last"] == pytest.approx((-1.5 - 2 - 2) / 3)
    assert both.loc["PLD", "over_kd_last_pairs"] == 2


def test_what_the_best_epoch_is_worth_by_hand(found):
    both = by_method(found, "all")
    assert both.loc["CE", "best_minus_last"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 0 + 0) / 6)
    assert both.loc["PLD", "best_minus_last"] == pytest.approx((2 + 0.5 + 0 + 0 + 0.5) / 5)
    total = both.loc[literature.ALL]
    assert total["best_minus_last"] == pytest.approx(7.5 / 17) and total["best_minus_last_n"] == 17
    assert by_method(found, "heterogeneous").loc["PLD", "best_minus_last_n"] == 1
    said = " ".join(literature_printing.legend_methods(found))
    assert "is worth +0.44 points here, as the mean over 17 trials" in said


def test_reported_gains_are_within_a_source(experiment, tmp_path):
    """DKD - KD on the pair: 1.31 in mdistiller, 1.32 beside LS, 0.80 in EDKD; TTM prints no KD."""
    text = TEXT.replace("[ce, kd, pld]", "[kd, dkd]")
    records = frames.frame(plan(experiment(text)), Store(tmp_path / "none"))
    one = records[records["student"] == "wrn_16_2"]
    row = by_method(literature.compare(one), "homogeneous").loc["DKD"]
    assert row["over_kd_reported"] == pytest.approx((1.31 + 1.32 + 0.80) / 3)
    assert row["over_kd_reported_pairs"] == 1


def test_ours_is_the_epoch_that_the_source_prints(found):
    at = (found.sources["method"] == "KD") & (found.sources["student"] == "wrn_16_2")
    table = found.sources[at].set_index("source")
    last, best = table.loc["HobbitLong/RepDistiller"], table.loc["megvii-research/mdistiller"]
    assert (last["epoch"], last["ours"], best["epoch"], best["ours"]) == ("last", 75.5, "best", 76)
    assert best["difference"] == pytest.approx(76 - 74.92)
    assert table.loc["zhengli97/CTKD", "ours"] == 75.5  # it does not say


def test_several_settings_of_a_loss_leave_its_reported_results_apart(experiment, tmp_path):
    text = TEXT.replace("[ce, kd, pld]", "[{name: kd, temperature: [1, 4]}]")
    records = frames.frame(plan(experiment(text)), Store(tmp_path / "none"))
    found = literature.compare(records)
    methods = list(dict.fromkeys(found.cells["method"]))
    assert methods == ["Teacher", "CE", "KD", "KD (τ = 1.0)", "KD (τ = 4.0)"] or methods == [
        "Teacher", "CE", "KD", "KD (τ = 1)", "KD (τ = 4)",
    ]  # fmt: skip
    assert found.unshown > 30
    assert literature.compare(records, everything=True).unshown == 0


def test_a_part_of_the_data_and_a_miniature_are_not_compared(experiment, tmp_path):
    text = TEXT.replace("data: cifar100", "data: {name: cifar100, limit: 500}")
    found = literature.compare(frames.frame(plan(experiment(text)), Store(tmp_path / "none")))
    assert found.sources.empty and "No source reports" in literature_printing.legend(found)[-1]
    small = plan(load_experiment("cifar100_methods", smoke=True))
    records = frames.frame(small, Store(tmp_path / "none"))
    found = literature.compare(records.assign(top1=50.0), miniature=True)
    assert len(found.sources) > 100 and found.sources["ours"].isna().all()
    assert "a miniature, which has other data" in literature_printing.legend(found)[-1]


# ---------------------------------------------------------------- what is shown


def cells_of(text):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]


def test_the_text_has_the_numbers_and_fits_the_terminal(found, results):
    text = literature_printing.text(found, results[0].experiment, 80)
    lines = cells_of(text)
    assert ["Teacher →", "Top-1 %", "wrn_40_2", "resnet56"] in lines
    assert ["Student", "", "wrn_16_2", "resnet20"] in lines
    assert ["KD", "last", "75.50 ± 0.71", "71.00 ± 1.41"] in lines
    assert ["", "best", "76.00 ± 1.41", "71.50 ± 0.71"] in lines
    assert ["", "reported", "74.92 (5)", "70.66 (5)"] in lines
    assert ["PLD", "last", "70.00 (n=1)"] in lines
    assert max(len(line) for line in text.splitlines()) <= 80
    wide = literature_printing.text(found, results[0].experiment)
    assert ["PLD", "1.50", "1.00", "+2.62", "", "+0.88", "", "+0.62 (4)"] in cells_of(wide)
    assert len(wide.splitlines()) < len(text.splitlines())


def test_headers_of_two_lines():
    columns = pd.MultiIndex.from_tuples([("T", "S"), ("a_1", "b"), ("a_1", "c")])
    cells = pd.DataFrame([["x", "1 ± 2", "3"]], columns=columns)
    assert rendering.markdown(cells, 1).splitlines() == [
        "| T   |   a_1 | a_1 |",
        "| --- | ----: | --: |",
        "| S   |     b |   c |",
        "| x   | 1 ± 2 |   3 |",
    ]
    tex = rendering.latex(cells, 1)
    assert r"T & \multicolumn{2}{r}{a\_1} \\" in tex and r"S & b & c \\" in tex
    assert "<th>T S</th><th class=n>a_1 b</th><th class=n>a_1 c</th>" in rendering.html(cells, 1)


def test_the_command_writes_all_formats_and_adds_results_of_the_user(results, tmp_path, cli):
    (tmp_path / "mine.csv").write_text(
        HEADER + "cifar100,wrn_40_2,wrn_16_2,Mine,77.1,0.2,3,A paper,best\n"
        "cifar100,resnet50,mobilenetv2,KD,68.10,,,A paper,last\n"  # without the suffix _cifar
        "cifar100,resnet50,resnet8,KD,60,,,A paper,last\n"
    )
    ended = cli("literature", "small.yaml", "--reported", "mine.csv", "--sources", cwd=tmp_path)
    assert ended.returncode == 0
    assert "mine.csv: 1 of 3 results are on other datasets or networks" in ended.stderr
    lines = cells_of(ended.stdout)
    assert ["Mine", "reported", "77.10", ""] in lines
    assert ["Mine", "A paper", "best", "77.10 ± 0.20 (n=3)", "–", "–", ""] in lines
    assert ["", "reported", "67.35–68.10 (5)"] in lines
    assert ["KD", "A paper", "last", "68.10", "67.50", "−0.60", ""] in lines
    folder = tmp_path / "results" / "reports" / "small"
    names = {path.name for path in folder.iterdir()}
    assert {f"literature.{kind}" for kind in ("md", "csv", "tex")} <= names
    assert {"literature-methods.csv", "literature-sources.md", "literature-sources.csv"} <= names
    table = pd.read_csv(folder / "literature.csv").set_index(["student", "method"])
    assert table.loc[("mobilenetv2_cifar", "KD"), ["low", "high"]].tolist() == [67.35, 68.10]
    tex = (folder / "literature.tex").read_text()
    assert r"KD & last & 75.50 $\pm$ 0.71 & 71.00 $\pm$ 1.41 \\" in tex
    assert r"\multicolumn{2}{r}{Rank} & \multicolumn{2}{r}{over CE}" in tex


def test_imported_results_are_a_source_too(results):
    made, store = results
    row = dict.fromkeys(imported.COLUMNS, "") | {"dataset": "cifar100", "student": "wrn_16_2"}
    row |= {"method": "PLD", "source": "x", "top1": 76.5, "std": math.nan, "n": math.nan}
    imported.keep(pd.DataFrame([row]), "x", store)
    found = literature.compare(frames.frame(made, store), [imported.stored(store)])
    cell = found.cells.set_index(literature.CELL).loc[(*WRN, "PLD")]
    assert cell[["low", "high", "sources"]].tolist() == [76.5, 76.5, 1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (HEADER + "cifar100,a,b,kd,7x,,,,\n", "line 2: top1 is '7x': expected a percentage, 0 to"),
        (HEADER + "cifar100,a,b,kd,70,,,,first\n", "line 2: epoch is 'first': expected 'last', 'b"),
        ("dataset,student,top1\nd,s,1\n", "the column 'method' is missing: expected"),
        (
            "dataset,student,method,top1,teacher_top1\nd,s,kd,70,170\n",
            "line 2: teacher_top1 is '170': expected a percentage, 0 to 100, or ''",
        ),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(content, said, experiment, tmp_path, cli):
    experiment(TEXT)
    (tmp_path / "mine.csv").write_text(content)
    ended = cli("literature", "small.yaml", "--reported", "mine.csv", cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr.startswith("pld-ray: mine.csv")
    assert said in ended.stderr and len(ended.stderr.splitlines()) == 1 and not ended.stdout


def test_trials_without_a_teacher_are_refused(experiment, tmp_path, cli):
    experiment("base: {data: cifar100, student: resnet20, epochs: 1}\ngrid: {loss: [ce]}\n")
    ended = cli("literature", "small.yaml", cwd=tmp_path)
    assert ended.returncode == 2
    assert "expected an experiment with trials that have a teacher" in ended.stderr


def test_the_report_has_the_tables(results, tmp_path):
    html, markdown = page.write([results[0]], results[1], tmp_path / "out")
    parsed = Page()
    parsed.feed(html.read_text())
    assert parsed.open == [] and "wrn_40_2 wrn_16_2" in " ".join(parsed.text)
    lines = cells_of(markdown.read_text())
    assert ["KD", "reported", "74.92 (5)", "70.66 (5)"] in lines
    assert "### Beside the literature: heterogeneous pairs" in markdown.read_text()
