"""The plan and the loop: nothing twice, only what depends on a change, on from where it stopped."""

from __future__ import annotations

from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from toys import PIPELINE, FakeCheckpoint, Looked, Seen, State, Total, planned, world

from moefold.errors import InputError, StageError, StoreError
from moefold.executors import InlineExecutor
from moefold.run import Event, run
from moefold.stage import Layers, Previous, stage
from moefold.store import Store


class Log:
    """What was called, read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def take(self) -> list[str]:
        lines = self.path.read_text().split("\n")[:-1]
        self.path.write_text("")
        return lines


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "work")


class Threads(InlineExecutor):
    """Several tasks at a time in this process."""

    def __init__(self, workers: int) -> None:
        self.pool = ThreadPoolExecutor(workers)

    def submit(self, fn, /, *args, **kwargs):
        return self.pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.pool.shutdown(wait, cancel_futures=cancel_futures)


def go(registry, store, text=PIPELINE, checkpoint=None, **options):
    events: list[Event] = []
    made = planned(registry, text, checkpoint)
    facts = run(made, store, InlineExecutor(), events.append, device="cpu", registry=registry, **options)
    return made, facts, events


def test_result_and_facts(log, store):
    made, facts, _ = go(world(log.path), store)
    total = store.get(made.ends[0], Total)
    # states 1, 1 + 1, 1 + 1 + 2; plus the layers' own numbers 1, 2, 3
    assert total.value == (1 + 2 + 4) + (1 + 2 + 3)
    assert {layer: note["facts"]["value"] for layer, note in facts["see"].items()} == {"1": 2.0, "2": 4.0, "3": 7.0}


def test_second_run_does_nothing(log, store):
    registry = world(log.path)
    go(registry, store)
    log.take()
    _, facts, events = go(registry, store)
    assert log.take() == []
    assert [e.kind for e in events] == ["planned"]
    assert facts["sum"]["all"]["stage"] == "sum"


def test_a_new_process_finds_the_results(log, store):
    registry = world(log.path)
    go(registry, store)
    log.take()
    go(registry, Store(store.root))
    assert log.take() == []


def test_changed_option_recomputes_only_what_depends_on_it(log, store):
    registry = world(log.path)
    go(registry, store)
    log.take()
    changed = PIPELINE.replace("- uses: see", "- uses: see\n    with: {factor: 2}")
    go(registry, store, changed)
    calls = log.take()
    # `see` needs the states, which were kept until read; the start is still there.
    assert "start" not in calls
    assert [c for c in calls if c.startswith("see")] == ["see 1", "see 2", "see 3"]
    assert calls.count("sum") == 1


def test_a_stored_reader_spares_what_it_read(log, store):
    """With the looks stored, a new sum needs no walk."""
    registry = world(log.path)
    made, _, _ = go(registry, store)
    store.drop(made.ends[0])
    log.take()
    go(registry, store)
    assert log.take() == ["sum"]


def test_until_read_is_dropped_and_bounded(log, store, monkeypatch):
    alive: list[int] = []
    put = Store.put

    def counting(self, key, value, note, **options):
        put(self, key, value, note, **options)
        notes = [v.with_name("note.json") for v in self.root.glob("results/*/*/value.safetensors")]
        alive.append(sum(1 for note in notes if '"State"' in note.read_text()))

    monkeypatch.setattr(Store, "put", counting)
    made, _, _ = go(world(log.path), store, checkpoint=FakeCheckpoint(count=12))
    assert max(alive) <= 2
    states = [t.key for t in made.tasks.values() if t.step == "walk"]
    assert not any(store.has(key, State) for key in states)
    assert all(store.note(key) for key in states)


def test_failure_names_stage_and_layer_and_the_next_run_goes_on(log, store):
    with pytest.raises(StageError, match=r"^see, layer 2: ValueError: the toy broke"):
        go(world(log.path, fail_at=2), store)
    first = log.take()
    assert "see 1" in first
    go(world(log.path), Store(store.root))
    second = log.take()
    assert "see 1" not in second
    assert "walk 1" not in second
    assert "walk 2" not in second  # kept until read, and not read to the end
    assert second.count("sum") == 1


@pytest.mark.parametrize("kind", [StageError, InputError])
def test_an_error_of_a_stage_names_it_once(log, store, kind):
    @stage("break")
    def breaks(all_: Layers[Looked]) -> Total:
        """Break."""
        raise kind("no good")

    with pytest.raises(kind, match=r"^break: no good$"):
        go(world(log.path, extra=(breaks,)), store, PIPELINE + "  - uses: break\n")


def test_lowest_layer_first(log, store):
    go(world(log.path), store)
    calls = [c for c in log.take() if c.startswith(("walk", "see"))]
    assert calls == ["walk 1", "see 1", "walk 2", "see 2", "walk 3", "see 3"]


def test_two_runs_do_not_share_a_store(log, store):
    registry = world(log.path)

    def hear(event: Event) -> None:
        if event.kind == "started":
            with pytest.raises(StoreError, match="another run uses"):
                go(registry, Store(store.root))

    run(planned(registry), store, InlineExecutor(), hear, device="cpu", registry=registry)


def test_checkpoint_version_device_and_options_are_in_the_key(log):
    registry = world(log.path)
    keys = set(planned(registry).tasks)
    assert keys == set(planned(registry).tasks)
    other = set(planned(registry, checkpoint=FakeCheckpoint(digest="g")).tasks)
    start = [t.key for t in planned(registry).tasks.values() if t.step == "start"]
    assert keys & other == set(start)  # only what does not depend on the model stays


def test_provenance_is_upstream_in_order(log, store):
    made, _, _ = go(world(log.path), store)
    steps = store.get(made.ends[0], Total).steps
    assert [s["id"] for s in steps] == ["model", "start", "walk", "see", "sum"]
    assert steps[3]["with"] == {"factor": 1.0}


def test_torn_result_is_computed_again(log, store):
    registry = world(log.path)
    made, _, _ = go(registry, store)
    log.take()
    looked = next(t for t in made.tasks.values() if t.step == "see")
    (store._place(looked.key) / "value.safetensors").unlink()
    store.drop(made.ends[0])
    go(registry, store)
    assert "see 1" in log.take()
    assert store.get(looked.key, Looked).value == 2.0


def test_unreadable_result_says_what_to_do(log, store):
    registry = world(log.path)
    made, _, _ = go(registry, store)
    looked = next(t for t in made.tasks.values() if t.step == "see")
    (store._place(looked.key) / "value.safetensors").write_bytes(b"not safetensors")
    store.drop(made.ends[0])
    with pytest.raises(StoreError, match="delete its directory and run again"):
        go(registry, store)


def test_circle_through_all_layers_is_refused(log):
    @stage("gather")
    def gather(states: Layers[State]) -> Seen:
        """Needs all layers."""
        return Seen(0.0)

    @stage("step")
    def step(seen: Seen, before: Previous[State]) -> State:
        """Needs the gathering."""
        raise AssertionError

    registry = world(log.path, extra=(gather, step))
    text = "model: a/b\nstages:\n  - uses: gather\n  - uses: step\n"
    with pytest.raises(InputError, match="circle"):
        planned(registry, text)


def test_several_workers_stay_within_the_window(log, store):
    registry = world(log.path)
    made = planned(registry, checkpoint=FakeCheckpoint(count=8))
    open_layers: set[int] = set()
    spread: list[int] = []

    def hear(event: Event) -> None:
        if event.layer is None:
            return
        if event.kind == "started":
            open_layers.add(event.layer)
            spread.append(max(open_layers) - min(open_layers))
        elif event.kind == "finished":
            open_layers.discard(event.layer)

    with Threads(4) as pool:
        run(made, store, pool, hear, device="cpu", registry=registry, workers=4, window=1)
    assert max(spread) <= 2
    assert store.get(made.ends[0], Total).value > 0


def test_a_full_disk_is_said_and_the_next_run_goes_on(log, store, monkeypatch):
    registry = world(log.path)

    def full(self, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Looked, "save", full)
        with pytest.raises(StoreError, match="cannot be written: No space left on device; make room"):
            go(registry, store)
    log.take()
    go(registry, store)
    assert "start" not in log.take()
    assert not (store.root / "writing").exists() or not list((store.root / "writing").iterdir())


def test_a_work_directory_that_is_a_file_is_said(log, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        go(world(log.path), Store(tmp_path / "file"))


class Dying(InlineExecutor):
    """A pool whose workers are killed, as the system does when memory runs out."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        future.set_exception(BrokenExecutor("terminated abruptly"))
        return future


def test_a_worker_that_dies_is_said(log, store):
    registry = world(log.path)
    with pytest.raises(StageError, match=r"start: a worker process died \(terminated abruptly\); if memory ran out"):
        run(planned(registry), store, Dying(), lambda event: None, device="cpu", registry=registry)
