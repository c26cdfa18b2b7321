"""A bank of the 64 best logits: what is read, what losses make of it, how large it is."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import SMALL, cells, chunks, opened, run, train

from pld_ray.cli.main import app
from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.data.images import Size
from pld_ray.data.sampling import order
from pld_ray.distill import bank_format, bank_plan
from pld_ray.errors import InputError
from pld_ray.losses import (
    DISTLoss,
    DKDLoss,
    KDLoss,
    NKDLoss,
    PLDLoss,
    TTMLoss,
    WTTMLoss,
    teacher_order,
)
from pld_ray.store.store import Store


def through(logits, kind):
    """What a bank returns for float32 logits [N, C]."""
    classes = logits.shape[1]
    rows = bank_format.pack(logits, bank_format.row_type(classes, kind))
    return bank_format.unpack(rows, classes)


def softmax(logits, temperature=1.0):
    z = logits.astype("f8") / temperature
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def logits_of(kind, rows, classes, seed=0):
    """Random float32 logits [rows, classes], and some that are hard to store."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((rows, classes))
    if kind == "sharp":
        z *= 8
    elif kind == "flat":
        z *= 1e-3
    elif kind == "equal":
        z[:] = -3.25
    elif kind == "ties":  # five values: ties at the 64th place
        z = rng.integers(-2, 3, z.shape)
    elif kind == "signed zeros":
        z = rng.choice([-0.0, -1e-9, -1.0], z.shape)  # float16 rounds the second one to -0.0
    elif kind == "shifted":  # the sum with the maximum rounds
        z = z * 1e-2 + 5000
    elif kind == "overflow":  # below the maximum by more than float16 holds
        z = z * 1e5
    elif kind == "few finite":
        z[rng.random(z.shape) < 0.9] = -np.inf
    elif kind == "one finite":
        z[:, 1:] = -np.inf
    elif kind == "far rest":  # exp(-2000) is 0 in float64
        z -= 2000 * (rng.permuted(np.tile(np.arange(classes), (rows, 1)), axis=1) >= 64)
    elif kind == "far zero":
        z[:, ::2] -= 2000
    return z.astype("f4")


KINDS = (
    "normal", "sharp", "flat", "equal", "ties", "signed zeros", "shifted", "overflow",
    "few finite", "one finite", "far rest", "far zero",
)  # fmt: skip


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [99, 300, 33_000])
def test_the_best_are_those_of_float16_and_the_rest_has_its_mass(kind, classes):
    logits = logits_of(kind, 6 if classes > 1000 else 40, classes)
    whole, read = through(logits, "float16"), through(logits, "top64")
    assert read.dtype == np.float32 and read.shape == logits.shape
    assert not np.isnan(read).any()
    ranked = np.argsort(-whole, 1, kind="stable")
    p, q = softmax(whole), softmax(read)
    for row in range(len(logits)):
        best, rest = ranked[row, :64], ranked[row, 64:]
        assert (read[row, best] == whole[row, best]).all()
        (u,) = {float(x) for x in read[row, rest]}
        assert u < read[row, best].min() or u == whole[row, rest].max() == -np.inf
        others = whole[row, rest].astype("f8")
        high = float(others.max())
        mean = high + np.log(np.exp(others - high).mean()) if np.isfinite(high) else high
        rounding = (
            2.0**-22 * max(abs(u), float(abs(whole[row].max())), 1) if np.isfinite(u) else 0.0
        )
        assert u == mean or abs(u - mean) <= rounding
        assert p[row, rest].sum() == pytest.approx(q[row, rest].sum(), rel=2 * rounding, abs=1e-300)
        assert p[row, best] == pytest.approx(q[row, best], rel=2 * rounding + 1e-12)
    first = teacher_order(torch.from_numpy(read)).numpy()[:, :64]
    assert (first == ranked[:, :64]).all()


def test_the_row_has_the_stored_mass_and_the_smallest_type_of_class():
    for classes, kind in ((99, "u1"), (256, "u1"), (257, "i2"), (2**15, "i2"), (2**15 + 1, "i4")):
        row = bank_format.row_type(classes, "top64")
        assert row.fields["classes"][0] == np.dtype((f"<{kind}", (64,)))
        assert row.itemsize == 64 * (2 + int(kind[1])) + 8
        logits = logits_of("normal", 5, classes)
        logits[:, -1] = 9  # the class with the largest index
        kept = bank_format.pack(logits, row)
        assert (kept["classes"][:, -1].astype("i8") == classes - 1).all()
        p = softmax(through(logits, "float16"))
        for i, stored in enumerate(kept):
            rest = np.delete(p[i], stored["classes"].astype("i8"))
            assert stored["rest"] == pytest.approx(np.log(rest.sum()), rel=1e-6)


# ---------------------------------------------------------------- what losses make of it


def cases(temperature, label):
    """Teachers of both banks, and what the bounds say, each sample by brute force.

    Returns, with S the 64 best classes and R the others: the float16 logits `t` and those that
    are read `u`, float64 [N, C]; whether a class is in R [N, C]; p and q, the softmax of both at
    the temperature; the mass of R in both; labels that are in S or not.
    """
    parts = [logits_of(k, 12, 200, i) for i, k in enumerate(("normal", "sharp", "flat", "ties"))]
    spiked = logits_of("normal", 12, 200, 9)  # one class has almost all of the rest's mass
    spiked[:, :65] = 6 + 0.01 * spiked[:, :65]
    spiked[:, 65:] -= 30
    logits = np.concatenate([*parts, spiked])
    t, u = (through(logits, kind) for kind in ("float16", "top64"))
    ranked = np.argsort(-t, 1, kind="stable")
    rest = np.ones(t.shape, bool)
    np.put_along_axis(rest, ranked[:, :64], False, 1)
    rng = np.random.default_rng(1)
    place = rng.integers(*((0, 64) if label == "inside" else (64, 200)), len(t))
    if label == "outside":
        place[::2] = 64  # the best class of R
    p, q = softmax(t, temperature), softmax(u, temperature)
    return SimpleNamespace(
        t=torch.from_numpy(t).double(),
        u=torch.from_numpy(u).double(),
        rest=rest,
        p=p,
        q=q,
        mass_p=(p * rest).sum(1),
        mass_q=(q * rest).sum(1),
        labels=torch.from_numpy(ranked[np.arange(len(t)), place]),
    )


def students(case):
    """Random students, and those that a difference between p and q moves most."""
    rng = np.random.default_rng(2)
    shape = case.p.shape
    yield rng.standard_normal(shape) * 3
    yield 10.0 * np.sign(case.p - case.q)
    yield 10.0 * np.sign(case.p - case.q) * case.rest
    yield 30.0 * (rng.random(shape) < 0.01)


def both(loss, student, case):
    """The losses [N] and gradients [N, C] with the float16 logits and those that are read.

    Losses that rank get the order, because torch.topk decides between equal logits as it likes.
    """
    found = []
    for teacher in (case.t, case.u):
        s = torch.from_numpy(student).requires_grad_()
        ranks = {"order": teacher_order(teacher)} if isinstance(loss, PLDLoss) else {}
        losses = loss(s, teacher, case.labels, **ranks)
        (gradient,) = torch.autograd.grad(losses.sum(), s)
        found += [losses.detach().numpy(), gradient.numpy()]
    return found


def spread(x, where=True):
    return np.max(x, 1, where=where, initial=-np.inf) - np.min(x, 1, where=where, initial=np.inf)


TEMPERATURES = [0.5, 1.0, 4.0]
ROUNDING = 1e-5  # the logit of the rest is a float32


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_rest_never_has_less_mass_at_higher_temperatures(temperature):
    case = cases(temperature, "inside")
    distance = np.abs(case.p - case.q).sum(1)
    if temperature > 1:
        assert (case.mass_q >= case.mass_p - ROUNDING).all()
        assert (case.mass_q > 1.5 * case.mass_p).any()
    elif temperature == 1:
        assert case.mass_q == pytest.approx(case.mass_p, rel=ROUNDING)
    else:
        assert (case.mass_q <= case.mass_p + ROUNDING).all()
    most = np.maximum(case.mass_p, case.mass_q)
    assert (distance <= 2 * most + ROUNDING).all()
    assert (distance > 1.9 * most)[most > 1e-3].any()  # the bound is nearly reached


@pytest.mark.parametrize("top_k", [1, 7, 64])
def test_top_k_pld_is_exact_for_labels_inside(top_k):
    case = cases(1.0, "inside")
    for student in students(case):
        loss = PLDLoss(top_k=top_k, reduction="none")
        before, slope, after, other = both(loss, student, case)
        assert after == pytest.approx(before, rel=ROUNDING, abs=1e-9)
        assert other == pytest.approx(slope, rel=ROUNDING, abs=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_top_k_pld_is_scaled_by_the_mass_of_the_best(temperature):
    case = cases(temperature, "inside")
    factor = (1 - case.mass_q) / (1 - case.mass_p)
    for student in students(case):
        loss = PLDLoss(temperature, top_k=64, reduction="none")
        before, slope, after, other = both(loss, student, case)
        assert after == pytest.approx(factor * before, rel=ROUNDING, abs=1e-9)
        assert other == pytest.approx(factor[:, None] * slope, rel=ROUNDING, abs=1e-6)


def test_a_label_outside_costs_pld_its_own_step_only():
    case = cases(1.0, "outside")
    rows = np.arange(len(case.p))
    off = np.abs(case.p - case.q)[rows, case.labels]
    for student in students(case):
        step = np.logaddexp.reduce(student, 1) - student[rows, case.labels]
        before, slope, after, other = both(PLDLoss(top_k=64, reduction="none"), student, case)
        assert np.abs(after - before) == pytest.approx(off * step, rel=1e-4, abs=1e-4)
        assert (np.abs(other - slope).sum(1) <= 2 * off + ROUNDING).all()
    assert (off > 0.01).any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top_k", [None, "auto"])
def test_pld_over_all_classes_is_bounded(temperature, top_k):
    case = cases(temperature, "inside")
    most = np.maximum(case.mass_p, case.mass_q)
    for student in students(case):
        loss = PLDLoss(temperature, top_k=top_k, reduction="none")
        best, *_ = both(PLDLoss(temperature, top_k=64, reduction="none"), student, case)
        before, slope, after, other = both(loss, student, case)
        scaled = np.abs(case.mass_p - case.mass_q) / (1 - case.mass_p)
        tail = most * (np.log(case.p.shape[1] - 64) + spread(student, case.rest))
        if top_k == "auto":  # it leaves out steps of less than 1e-3, also among the 64 best
            tail += 1e-3 * (np.log(200) + spread(student))
        assert (np.abs(after - before) <= scaled * best + tail + ROUNDING).all()
        if top_k is None:
            assert (np.abs(other - slope).sum(1) <= 4 * most + ROUNDING).all()


def test_adaptive_weights_of_pld_are_nearly_the_same():
    case = cases(1.0, "inside")
    before, after = (PLDLoss(adaptive="margin").weigh_samples(x) for x in (case.t, case.u))
    assert after.numpy() == pytest.approx(before.numpy(), abs=ROUNDING)
    before, after = (PLDLoss(adaptive="entropy").weigh_samples(x) for x in (case.t, case.u))
    fall = (before - after).numpy()
    assert (fall >= -ROUNDING).all() and (fall <= case.mass_p + ROUNDING).all()
    assert fall.max() > 0.01


@pytest.mark.parametrize("label", ["inside", "outside"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kd_is_bounded(temperature, label):
    case = cases(temperature, label)
    most = np.maximum(case.mass_p, case.mass_q)
    weight = 0.9
    loss = KDLoss(temperature, ce_weight=1 - weight, reduction="none")
    flat, _, constant, _ = both(loss, np.zeros(case.p.shape), case)
    for student in students(case):
        before, slope, after, other = both(loss, student, case)
        moved = np.abs((after - before) - (constant - flat))  # what depends on the student
        assert (moved <= weight * temperature * most * spread(student) + ROUNDING * 100).all()
        change = np.abs(other - slope).sum(1)
        assert (change <= 2 * weight * temperature * most + ROUNDING).all()
        if temperature == 1:
            assert (moved <= weight * case.mass_p * spread(student, case.rest) + 1e-3).all()
            n = case.p.shape[1] - 64
            inner = np.where(case.rest, case.p, 0) / case.mass_p[:, None]
            entropy = -np.sum(inner * np.log(np.where(inner > 0, inner, 1)), 1)
            known = weight * case.mass_p * (np.log(n) - entropy)
            assert flat - constant == pytest.approx(known, abs=ROUNDING)
    assert (change > weight * temperature * most)[most > 0.01].any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_jensen_shannon_is_bounded(temperature):
    case = cases(temperature, "inside")
    most = np.maximum(case.mass_p, case.mass_q)
    loss = KDLoss(temperature, 0.0, "jensen_shannon", reduction="none")
    for student in students(case):
        before, _, after, _ = both(loss, student, case)
        roots = [np.sqrt(np.maximum(x, 0)) / temperature for x in (before, after)]
        assert (np.abs(roots[0] - roots[1]) <= np.sqrt(most * np.log(2)) + 1e-3).all()


@pytest.mark.parametrize("label", ["inside", "outside"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dkd_is_bounded(temperature, label):
    case = cases(temperature, label)
    rows, at = np.arange(len(case.p)), case.labels.numpy()
    others = np.ones(case.p.shape, bool)
    others[rows, at] = False
    masses = [(x * (case.rest & others)).sum(1) / (x * others).sum(1) for x in (case.p, case.q)]
    most, most_others = np.maximum(case.mass_p, case.mass_q), np.maximum(*masses)
    off = np.abs(case.p - case.q)[rows, at]
    if temperature == 1 and label == "inside":
        assert off == pytest.approx(0, abs=ROUNDING)
        assert most_others == pytest.approx(case.mass_p / (1 - case.p[rows, at]), rel=1e-4)
    if temperature >= 1:  # known from the bank alone
        assert (most_others <= case.mass_q / (1 - case.q[rows, at]) + ROUNDING).all()
    assert (off <= most + ROUNDING).all()
    for part, bound in (((1.0, 0.0), off), ((0.0, 1.0), most_others)):
        loss = DKDLoss(temperature, 0.0, *part, reduction="none")
        flat, _, constant, _ = both(loss, np.zeros(case.p.shape), case)
        for student in students(case):
            before, slope, after, other = both(loss, student, case)
            change = np.abs(other - slope).sum(1)
            assert (change <= 2 * temperature * bound + 1e-4).all()
            moved = np.abs((after - before) - (constant - flat))
            if part[1]:
                assert (moved <= temperature * bound * spread(student, others) + 1e-3).all()
            else:
                q = softmax(student, temperature)[rows, at]
                odds = np.abs(np.log(q / (1 - q)) + np.log(case.p.shape[1] - 1))
                assert (moved <= temperature**2 * bound * odds + 1e-3).all()
    if label == "outside":
        assert (change > most_others * temperature / 2)[most_others > 0.01].any()


@pytest.mark.parametrize("label", ["inside", "outside"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nkd_is_bounded(temperature, label):
    case = cases(temperature, label)
    rows, at = np.arange(len(case.p)), case.labels.numpy()
    others = np.ones(case.p.shape, bool)
    others[rows, at] = False
    masses = [(x * (case.rest & others)).sum(1) / (x * others).sum(1) for x in (case.p, case.q)]
    most_others = np.maximum(*masses)
    off = np.abs(softmax(case.t.numpy())[rows, at] - softmax(case.u.numpy())[rows, at])
    if label == "inside":
        assert off == pytest.approx(0, abs=ROUNDING)
    gamma = 1.5
    loss = NKDLoss(temperature, 0.0, gamma, reduction="none")
    for student in students(case):
        before, slope, after, other = both(loss, student, case)
        step = np.logaddexp.reduce(student, 1) - student[rows, at]
        bound = off * step + gamma * temperature * most_others * spread(student, others)
        assert (np.abs(after - before) <= bound + 1e-3).all()
        change = np.abs(other - slope).sum(1)
        assert (change <= 2 * off + 2 * gamma * temperature * most_others + 1e-4).all()
    assert (change > gamma * temperature * most_others)[most_others > 0.01].any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ttm_is_bounded(temperature):
    case = cases(temperature, "inside")
    most, beta = np.maximum(case.mass_p, case.mass_q), 3.0
    loss = TTMLoss(temperature, 0.0, beta, reduction="none")
    flat, _, constant, _ = both(loss, np.zeros(case.p.shape), case)
    for student in students(case):
        before, slope, after, other = both(loss, student, case)
        moved = np.abs((after - before) - (constant - flat))
        assert (moved <= beta * most * spread(student) + ROUNDING * 100).all()
        change = np.abs(other - slope).sum(1)
        assert (change <= 2 * beta * most + ROUNDING * 10).all()
    assert (change > beta * most)[most > 0.01].any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_wttm_is_bounded(temperature):
    case = cases(temperature, "inside")
    beta, powers = 3.0, [softmax(x.numpy()) ** (1 / temperature) for x in (case.t, case.u)]
    tails = [(x * case.rest).sum(1) for x in powers]
    if temperature >= 1:  # known from the bank alone
        assert (tails[0] <= tails[1] * (1 + ROUNDING)).all()
        assert tails[1] == pytest.approx(case.mass_q * powers[1].sum(1), rel=ROUNDING)
    most = np.maximum(*tails)
    constants = []  # what does not depend on the student
    for x in powers:
        q = x / x.sum(1, keepdims=True)
        constants.append(beta * (x * np.log(np.where(q > 0, q, 1))).sum(1))
    loss = WTTMLoss(temperature, 0.0, beta, reduction="none")
    for student in students(case):
        before, slope, after, other = both(loss, student, case)
        moved = np.abs((after - constants[1]) - (before - constants[0]))
        least = np.min(student, 1, where=case.rest, initial=np.inf)
        steps = np.logaddexp.reduce(student, 1) - least
        assert (moved <= beta * most * steps + 1e-3).all()
        change = np.abs(other - slope).sum(1)
        assert (change <= 2 * beta * most + 1e-3).all()
    if temperature >= 1:
        assert (change > beta * most)[most > 0.01].any()


@pytest.mark.parametrize("label", ["inside", "outside"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dist_is_bounded(temperature, label):
    case = cases(temperature, label)
    difference = case.p - case.q
    most = np.maximum(case.mass_p, case.mass_q)
    distance = np.linalg.norm(difference, axis=1)
    assert (distance <= 2 * most + ROUNDING).all()
    if temperature == 1:
        least = np.min(case.p, 1, where=~case.rest, initial=1)
        assert (distance <= np.sqrt(case.mass_p * least) + ROUNDING).all()
    rows = np.linalg.norm(case.q - case.q.mean(1, keepdims=True), axis=1)
    columns = np.linalg.norm(case.q - case.q.mean(0), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        inter = 2 * np.minimum(1, np.nan_to_num(distance / rows, nan=1))
        intra = 2 * np.minimum(1, np.linalg.norm(difference, axis=0) / columns).mean()
    usable = rows > 1e-3  # below it, the 1e-8 in the denominator of the loss counts
    assert usable.sum() > 20
    for student in students(case):
        loss = DISTLoss(temperature, 0.0, 1.0, 0.0, tau_squared=False, reduction="none")
        before, _, after, _ = both(loss, student, case)
        assert (np.abs(after - before) <= inter + 1e-3)[usable].all()
        loss = DISTLoss(temperature, 0.0, 0.0, 1.0, tau_squared=False, reduction="none")
        before, _, after, _ = both(loss, student, case)
        assert (np.abs(after - before) <= intra + 1e-3).all()


# ---------------------------------------------------------------- through a bank


def many_classes(experiment, store, classes, *overrides):
    """Trials on the digits with more classes than they need, their images and their teacher."""
    trials = cells(experiment, "epochs=2", "data.limit=100", *overrides)
    images = replace(load(trials[0].data), classes=classes)
    train(trials[0].teacher, images, store, lambda metrics: None)
    return trials, images


@pytest.mark.parametrize(("classes", "row"), [(200, 200), (300, 264), (5000, 264)])
def test_planned_sizes_are_those_on_the_disk(experiment, tmp_path, classes, row):
    store = Store(tmp_path)
    trials, images = many_classes(experiment, store, classes, "teacher.logits=top64")
    planned = bank_plan.planned(trials, lambda data: Size(100, 360, classes), store)
    assert sorted(p.bytes for p in planned.values()) == [2 * 100 * row, 360 * classes * 4]
    bank_plan.check_top64(planned.values())
    for trial in trials:  # PLD and KD
        train(trial, images, store, lambda metrics: None)
    assert chunks(store, "order") == []
    on_disk = sum(p.stat().st_size - 12 for p in chunks(store))
    assert on_disk == sum(p.bytes for p in planned.values())


def test_students_learn_from_it_what_the_bounds_say(experiment, tmp_path):
    store = Store(tmp_path)
    losses = "grid.loss=[{name: pld, top_k: 32}, pld, {name: kd, temperature: 1}]"
    sets = "teacher.logits=top64", "teacher.train.epochs=10"
    (exact, pld, kd), images = many_classes(experiment, store, 300, losses, *sets)
    banks = {}
    for kind in ("float16", "top64"):
        for trial in (exact, pld, kd):
            trial = trial.model_copy(update={"teacher_logits": kind})
            banks[kind, trial.loss] = run(trial, store, images)["metrics"]["train_loss"]
    half = exact.model_copy(update={"teacher_logits": "float16"})
    whole, *_ = opened(half, store, images)
    best, *_ = opened(exact, store, images)
    index = order(exact.seed, 1, 100)
    logits, read = whole.read(index, 1)[0].numpy(), best.read(index, 1)[0].numpy()
    assert (read == through(logits, "top64")).all() and (read != logits).any()
    labels = images.train_labels[index]
    least = np.sort(read, 1)[:, -64]
    assert (read[np.arange(100), labels] >= least).all()  # all labels are inside
    assert banks["top64", exact.loss] == pytest.approx(banks["float16", exact.loss], rel=1e-4)
    for loss in (pld.loss, kd.loss):
        assert banks["top64", loss] != banks["float16", loss]
        assert banks["top64", loss] == pytest.approx(banks["float16", loss], rel=0.05)


# ---------------------------------------------------------------- what is refused


def test_it_is_no_default_and_another_trial(experiment):
    plain, half, best = (
        plan(experiment(SMALL.replace(", logits: float32", logits))).cells[0].trial
        for logits in ("", ", logits: float16", ", logits: top64")
    )
    assert plain.id == half.id != best.id and best.teacher.id == half.teacher.id


@pytest.mark.parametrize("classes", [10, 64, 98, 99])
def test_it_is_refused_where_it_spares_nothing(experiment, tmp_path, classes):
    trials, store = cells(experiment, "teacher.logits=top64"), Store(tmp_path)
    banks = bank_plan.planned(trials, lambda data: Size(10, 10, classes), store).values()
    if classes == 99:
        bank_plan.check_top64(banks)
        return
    said = f"'digits' has {classes} classes: it would store 200 bytes per image, and float16 stores"
    with pytest.raises(InputError, match=f"{said} {2 * classes + 4}: expected float16, float32 or"):
        bank_plan.check_top64(banks)


@pytest.mark.parametrize("command", [["plan"], ["plan", "--json"], ["run"], ["bank", "build"]])
def test_commands_refuse_it_before_anything_starts(experiment, tmp_path, command):
    cells(experiment, "teacher.logits=top64")
    where = [str(tmp_path / "small.yaml"), "--storage", str(tmp_path / "results")]
    with pytest.raises(InputError, match=r"teacher\.logits is 'top64' and data 'digits' has 10"):
        app([*command, *where, "--set", "teacher.logits=top64"], standalone_mode=False)
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.parametrize("loss", ["listmle", "plistmle"])
def test_losses_that_rank_all_classes_refuse_it(experiment, loss):
    with pytest.raises(
        InputError, match=f"'top64': loss {loss} ranks all classes, and top64 keeps"
    ):
        cells(experiment, "teacher.logits=top64", f"grid.loss=[{loss}]")


def test_a_miniature_keeps_float16(experiment, tmp_path):
    cells(experiment)
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("logits: float32", "logits: top64"))
    assert {cell.trial.teacher_logits for cell in plan(load_experiment(path)).cells} == {"top64"}
    small = plan(load_experiment(path, smoke=True))
    assert {cell.trial.teacher_logits for cell in small.cells} == {"float16"}
