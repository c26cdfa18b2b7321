"""Steps that are captured once and replayed, with a stand-in for CUDA graphs."""

import pytest
import torch
from small import cells, live, run, weights

from pld_ray import plugins
from pld_ray.distill import steps
from pld_ray.distill.device import Clock, device_failed
from pld_ray.distill.optimization import load_optimizer
from pld_ray.store.store import Store


class StandIn:
    """Replays by calling the step again with the tensors that were captured.

    As with a graph, whatever else differs between steps keeps its value of the capture, and what
    the host counts is counted in the capture only.
    """

    def __init__(self, clock):
        self.clock, self.counts = clock, {"warm": 0, "captured": 0, "replayed": 0}

    def warm_up(self, step, given):
        self.counts["warm"] += 1
        return step(*given), False

    def capture(self, step, given):
        self.counts["captured"] += 1
        teacher = owner(step).distiller.teacher
        if teacher is not None:
            teacher.images_seen += 32

        def replay():
            self.counts["replayed"] += 1
            before = teacher.images_seen if teacher is not None else 0
            loss = step(*given)
            if teacher is not None:
                teacher.images_seen = before
            return loss

        return replay


def owner(step):
    """The `Steps` that a step belongs to."""
    found = (cell.cell_contents for cell in step.__closure__)
    return next(each for each in found if isinstance(each, steps.Steps))


def trained(monkeypatch, tmp_path, trial, kind=StandIn, warm=steps.WARM_UP):
    """Weights, record and counts of a trial whose steps are captured after some steps."""
    made = []

    def graphs_for(trial, optimizer, clock, alone):
        made.append(kind(clock))
        return made[-1]

    monkeypatch.setattr(steps, "graphs_for", graphs_for)
    monkeypatch.setattr(steps, "WARM_UP", warm)
    store = Store(tmp_path / f"{kind.__name__}{warm}")
    record = run(trial, store)
    return weights(store, trial), record, made[-1].counts


# 150 images in batches of 32: 4 whole batches and one of 22, in 3 epochs
@pytest.mark.parametrize(
    ("changes", "captured", "replayed"),
    [
        (["loss=pld", "ema=0.9", "schedule.name=cosine"], 1, 9),
        (["loss=kd", "optimizer.name=adamw", "optimizer.lr=0.01", "clip_grad=1"], 1, 9),
        (["loss=kd", "data.mixup=0.4", "data.cutmix=1.0"], 1, 9),
        # from epoch 2 on, most partners are in other batches, so that a batch needs more images
        (["loss=kd", "data.mixup=0.4", "teacher.views=1"], 2, 6),
        (["loss=mlkd"], 1, 9),  # two views of each image
        # the weight of DKD rises in each epoch: a graph holds it, so each epoch has its own
        (["loss={name: dkd, warmup_epochs: 3}"], 3, 3),
    ],
)
def test_replays_have_the_bits_of_steps(
    monkeypatch, tmp_path, experiment, changes, captured, replayed
):
    trial = cells(experiment, *changes)[0]
    ours, record, counts = trained(monkeypatch, tmp_path, trial)
    expected, other, _ = trained(monkeypatch, tmp_path, trial, warm=10**9)
    assert ours == expected
    assert record["metrics"]["train_loss"] == other["metrics"]["train_loss"]
    assert (counts["captured"], counts["replayed"]) == (captured, replayed)
    assert record["environment"]["cuda_graph"] and not other["environment"]["cuda_graph"]


def test_a_replay_counts_the_images_of_a_live_teacher(monkeypatch, tmp_path, experiment):
    trial = live(cells(experiment)[0])
    _, record, counts = trained(monkeypatch, tmp_path, trial)
    _, other, _ = trained(monkeypatch, tmp_path, trial, warm=10**9)
    assert counts["replayed"] == 9
    assert record["teacher_images"] == other["teacher_images"]


def test_steps_in_which_the_host_waits_are_not_captured(monkeypatch, tmp_path, experiment):
    class Waiting(StandIn):
        def warm_up(self, step, given):
            loss, _ = super().warm_up(step, given)
            return loss, self.counts["warm"] == steps.WARM_UP

    trial = live(cells(experiment)[0])
    ours, record, counts = trained(monkeypatch, tmp_path, trial, Waiting)
    assert counts == {"warm": 3, "captured": 0, "replayed": 0}
    assert not record["environment"]["cuda_graph"]
    assert record["notes"][-1] == "no CUDA graph of the steps: the host waits for the GPU in them"
    expected, _, _ = trained(monkeypatch, tmp_path, trial, warm=10**9)
    assert ours == expected


def test_a_step_that_cannot_be_captured_ends_the_process(monkeypatch, tmp_path, experiment):
    class Failing(StandIn):
        def capture(self, step, given):
            try:
                raise RuntimeError("operation not permitted when stream is capturing")
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error")

    said = (
        r"a step cannot be captured as a CUDA graph \(operation not permitted when stream is "
        r"capturing\): expected cuda_graphs: false"
    )
    with pytest.raises(RuntimeError, match=said) as caught:
        trained(monkeypatch, tmp_path, cells(experiment)[0], Failing)
    assert device_failed(caught.value)


def on_cuda(parameters):
    return torch.optim.SGD(parameters, 0.1, fused=True)


@pytest.mark.parametrize(
    ("changes", "device", "alone", "optimizer", "expected"),
    [
        ([], "cuda", True, on_cuda, True),
        ([], "cpu", True, on_cuda, False),
        ([], "cuda", False, on_cuda, False),
        (["cuda_graphs=false"], "cuda", True, on_cuda, False),
        ([], "cuda", True, lambda p: torch.optim.SGD(p, 0.1), False),
        ([], "cuda", True, lambda p: torch.optim.RMSprop(p, 0.1), False),
        ([], "cuda", True, lambda p: torch.optim.AdamW(p, 0.1, fused=True), False),
        ([], "cuda", True, lambda p: torch.optim.AdamW(p, fused=True, capturable=True), True),
    ],
)
def test_what_is_captured(monkeypatch, experiment, changes, device, alone, optimizer, expected):
    monkeypatch.setattr(steps, "CudaGraphs", lambda clock: "graphs")
    trial = cells(experiment, *changes)[0]
    made = optimizer([torch.nn.Parameter(torch.ones(1))])
    found = steps.graphs_for(trial, made, Clock(torch.device(device)), alone)
    assert (found == "graphs") is expected


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("loss", "pld", None),
        ("network", "resnet8", None),
        ("optimizer", "adamw", None),
        ("dataset", "digits", "graphs"),
        ("schedule", "cosine", "graphs"),
    ],
)
def test_steps_with_code_of_a_plugin_are_not_captured(
    monkeypatch, experiment, kind, name, expected
):
    monkeypatch.setattr(steps, "CudaGraphs", lambda clock: "graphs")
    trial = cells(experiment)[0]
    monkeypatch.setitem(plugins.PROVIDED, (kind, name), plugins.Plugin("mine", "mine.py", ()))
    made = on_cuda([torch.nn.Parameter(torch.ones(1))])
    assert steps.graphs_for(trial, made, Clock(torch.device("cuda")), True) == expected


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_continues_with_the_kernels_of_its_device(kind):
    def three_steps(first, second):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind([weight], 0.1, **momentum, **first)
        for number in range(3):
            if number == 1:
                state = optimizer.state_dict()
                optimizer = kind([weight], 0.1, **momentum, **second)
                load_optimizer(optimizer, state)
            weight.grad = weight.detach() ** 2
            optimizer.step()
        return weight.detach(), optimizer.param_groups[0]["fused"]

    plain, fused = {}, {"fused": True}
    expected, chosen = three_steps(plain, plain)
    assert not chosen
    for first, second in ((plain, fused), (fused, plain)):
        found, chosen = three_steps(first, second)
        assert bool(chosen) is (second is fused)
        torch.testing.assert_close(found, expected)


class Events:
    """Events of a CUDA graph: each replay takes `seconds`."""

    seconds = 0.0

    def __init__(self, enable_timing, external):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 1000 * Events.seconds


def test_the_clock_of_a_graph_counts_its_replays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Events)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = Clock(torch.device("cuda"))
    clock.weight = 0.0  # the capture takes no time of the device
    with clock.capture(), clock("student"):
        pass
    clock.replays, Events.seconds = 390, 0.5
    assert clock.read() == {"student": 195.0}
    assert clock.read() == {}
    clock.replays, Events.seconds = 3, 0.25
    with clock.capture(), clock("student"):  # another graph, in the middle of an epoch
        pass
    clock.replays, Events.seconds = 2, 0.5
    assert clock.read() == {"student": 3 * 0.25 + 2 * 0.5}
