"""Broken and hostile input: one sentence or a result, never a traceback, never a hang.

python -m pytest tests/test_fuzz.py --hypothesis-profile=thorough    # 10,000 cases of each
"""

import contextlib
import io
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.records import frames
from pld_ray.cli.main import app
from pld_ray.config.experiment import experiments_folder, load_experiment
from pld_ray.config.planning import plan
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep import search

SHIPPED = sorted(experiments_folder().glob("*.yaml"))
TEXTS = [path.read_text() for path in SHIPPED]
calm = settings(deadline=None, suppress_health_check=list(HealthCheck))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.floats(),
    st.sampled_from(
        ["ce", "pld", "digits", "resnet8", "adamw", "1e-3", "", "../../x", "pretrained"]
    ),
    st.text(max_size=5),
)
KEYS = (
    "name title recipe base grid seeds resources search overrides smoke data student teacher loss "
    "optimizer schedule epochs batch_size workers temperature lr space num_trials algorithm "
    "scheduler loss.temperature optimizer.lr uniform int choice args weights train views"
)
keys = st.sampled_from(KEYS.split())
values = st.recursive(
    scalars,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(keys, inside, max_size=3),
    max_leaves=6,
)


def expand(path, tmp_path):
    made = load_experiment(path)
    if len(str(made.grid)) < 400 and len(made.seeds) < 9:
        if made.search is None:
            plan(made)
        elif (made.search.num_trials or 9) < 99:
            search.plan(made, Store(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "recipes").mkdir()
    return folder


@calm
@given(st.dictionaries(keys, values, max_size=6))
def test_any_mapping_is_an_experiment_or_one_sentence(folder, mapping):
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump(mapping, allow_unicode=True), encoding="utf-8")
    one_sentence(lambda: expand(path, folder))


@calm
@given(st.sampled_from(TEXTS), st.data())
def test_a_shipped_experiment_with_something_wrong(folder, text, data):
    raw = yaml.safe_load(text)
    at = raw
    while isinstance(at, dict) and at and data.draw(st.booleans()):
        inside = at[data.draw(st.sampled_from(sorted(at)))]
        if not isinstance(inside, dict) or not inside:
            break
        at = inside
    at[data.draw(keys | st.sampled_from(sorted(at)))] = data.draw(values)
    path = folder / "shipped.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    one_sentence(lambda: expand(path, folder))


@calm
@given(st.sampled_from(TEXTS), st.data())
def test_damaged_yaml(folder, text, data):
    content = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = folder / "damaged.yaml"
    path.write_bytes(content)
    one_sentence(lambda: expand(path, folder))


@calm
@given(
    st.lists(
        st.tuples(keys, st.text(max_size=12) | st.from_regex(r"[\[{&*!]*[a-z0-9:,. ]*[\]}]*")),
        max_size=3,
    )
)
def test_overrides(pairs):
    sets = tuple(f"{field}={text}" for field, text in pairs)
    one_sentence(lambda: load_experiment("demo", sets))


def one_sentence(action):
    try:
        action()
    except InputError as error:
        assert str(error) and "\n" not in str(error).strip("\n")


@calm
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=4),
        lambda inside: (
            st.lists(inside, max_size=2)
            | st.dictionaries(
                st.sampled_from(
                    ["metrics", "seconds", "top1", "notes", "parameters", "sha256", "id"]
                ),
                inside,
                max_size=5,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_record_is_a_record_or_none(folder, content):
    store = Store(folder / "records")
    made = plan(load_experiment("demo", ("seeds=[0]", "grid.loss=[ce]")))
    trial = made.cells[0].trial
    for name in ("record.json", "failure.json", "stopped.json", "epochs.jsonl", "landscape.json"):
        store.files.write(f"trials/{trial.id}/{name}", content)
    frame = frames.frame(made, store)
    assert frame["finished"].tolist() == [store.record(trial.id) is not None]
    frames.curves(frames.frame(made, store), store)
    store.failure(trial.id), store.stopped(trial.id), store.landscape(trial.id)
    store.files.write(f"trials/{trial.id}/checkpoint.pt", content)
    assert store.load_checkpoint(trial) is None


ARGUMENTS = (
    "plan status figures best export bank ls rm demo runtime nosuch --json --set "
    "--smoke --storage --out --all --help epochs=2 seeds=[] loss=pld grid.loss=[ce,kd] data=3 "
    "--points -- - x.yaml 3 s3: file:///dev/null/x"
)


@calm
@given(st.lists(st.sampled_from(ARGUMENTS.split()) | st.text(max_size=6), max_size=6))
def test_the_command_line(folder, arguments):
    storage = str(folder / "storage")
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.chdir(folder):
        try:
            app([*arguments, "--storage", storage], prog_name="pld-ray")
        except SystemExit as end:
            code = end.code
        except (InputError, OSError) as error:
            assert str(error)
    assert code in (0, 1, 2, None)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a\0", "/etc", "~", ".hidden", "a b"])
def test_a_name_cannot_lead_out_of_the_storage(tmp_path, name):
    path = tmp_path / "x.yaml"
    path.write_text(f"name: {json.dumps(name)}\nbase: {{data: digits}}")
    with pytest.raises(InputError, match="name is "):
        load_experiment(path)


@pytest.mark.parametrize(
    "text",
    [
        "base: !!python/object/apply:os.system ['touch hacked']",
        "base: !!python/name:os.system",
        "a: &a [*a]",
        "a: &a {b: *a}",
        "&x [" * 3000,
        "x: " + "[" * 5000 + "]" * 5000,
    ],
)
def test_yaml_makes_no_objects(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        plan(load_experiment(path))
    assert not Path("hacked").exists()


def test_aliases_that_would_fill_the_memory(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(9))}]" for i in range(1, 30)]
    path = tmp_path / "x.yaml"
    path.write_text("\n".join([*lines, "base: {args: *a29}", "grid: *a29"]))
    with pytest.raises(InputError):
        plan(load_experiment(path))
