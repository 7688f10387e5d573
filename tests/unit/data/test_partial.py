import os
from pathlib import Path

import pytest

from pipeline.data.partial import OWN_NAMES, Partial, Plan, Share
from pipeline.data.plan import Layout
from pipeline.errors import DataError

PLAN = Plan({"seed": 0}, "f" * 64, "digits", ["a", "b"], "single", num_ignored=3)
LAYOUT = Layout({"train": {0: 3, -1: 2}, "val": {1: 1}}, num_listed=7, notes=["odd"])


@pytest.fixture
def partial(tmp_path: Path) -> Partial:
    return Partial(tmp_path / "dataset")


def test_plan_and_layout_are_read_as_they_were_written(partial: Partial) -> None:
    assert (partial.read_plan(), partial.read_layout()) == (None, None)
    partial.write_plan(PLAN)
    partial.write_layout(LAYOUT)
    assert (partial.read_plan(), partial.read_layout()) == (PLAN, LAYOUT)


def test_a_plan_that_is_no_json_is_named(partial: Partial) -> None:
    partial.root.mkdir(parents=True)
    partial.plan_path.write_text("{")
    with pytest.raises(DataError, match=r"plan\.json: is damaged .* Remove .*/\.partial and run again"):
        partial.read_plan()


def test_a_shard_is_done_when_its_sidecar_and_all_of_its_bytes_are_there(partial: Partial) -> None:
    partial.shards_dir.mkdir(parents=True)
    tar = partial.shard_path("train-000000.tar")
    assert partial.read_sidecar(tar.name) is None
    tar.write_bytes(bytes(10))
    assert partial.read_sidecar(tar.name) is None
    partial.write_json(partial.sidecar_path(tar.name), {"num_bytes": 10})
    assert partial.read_sidecar(tar.name) == {"num_bytes": 10}
    os.truncate(tar, 9)
    assert partial.read_sidecar(tar.name) is None
    tar.unlink()
    assert partial.read_sidecar(tar.name) is None


def test_a_job_removes_what_it_left_half_written_and_nothing_of_others(tmp_path: Path) -> None:
    mine, other, alone = Partial(tmp_path, "part-1-of-12"), Partial(tmp_path, "part-11-of-12"), Partial(tmp_path)
    mine.shards_dir.mkdir(parents=True)
    names = [".a.tar.part-1-of-12.tmp", ".a.tar.part-11-of-12.tmp", "a.tar"]
    for name in names:
        (mine.shards_dir / name).touch()
    mine.remove_temporary()
    assert sorted(path.name for path in mine.shards_dir.iterdir()) == sorted(names[1:])
    other.remove_temporary()
    assert [path.name for path in mine.shards_dir.iterdir()] == ["a.tar"]
    (mine.shards_dir / names[0]).touch()
    alone.remove_temporary()  # nobody else is at work then
    assert [path.name for path in mine.shards_dir.iterdir()] == ["a.tar"]


def test_wiping_removes_the_work_but_no_lock(partial: Partial) -> None:
    partial.write_plan(PLAN)
    partial.write_layout(LAYOUT)
    partial.write_json(partial.hashes_path(0), {})
    (partial.root / ".part-1-of-2.lock").touch()
    partial.wipe()
    assert [path.name for path in partial.root.rglob("*")] == [".part-1-of-2.lock"]


def test_the_number_of_parts_is_that_of_the_part_which_began_last(partial: Partial) -> None:
    assert partial.num_parts() == 1
    partial.root.mkdir(parents=True)
    for time, name in enumerate((".part-1-of-2.lock", ".part-3-of-5.lock", ".plan.lock", ".part-2-of-2.lock")):
        (partial.root / name).touch()
        os.utime(partial.root / name, (time, time))
    assert partial.num_parts() == 2


def test_only_empty_folders_are_removed(partial: Partial) -> None:
    partial.remove_if_empty()
    partial.root.mkdir(parents=True)
    partial.remove_if_empty()
    assert not partial.folder.exists()
    partial.root.mkdir(parents=True)
    (partial.folder / "notes.txt").touch()
    partial.remove_if_empty()
    assert [path.name for path in partial.folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_the_shares_of_all_parts_are_everything_once(num_parts: int) -> None:
    shares = [Share(part, num_parts) for part in range(1, num_parts + 1)]
    assert [sum(share.has(number) for share in shares) for number in range(20)] == [1] * 20
    assert len({share.owner for share in shares}) == num_parts


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("train-000000.tar", True),
        ("val.index.npy", True),
        ("test.labels.npy", True),
        ("rejected.jsonl", True),
        ("inspect.html", True),
        ("inspect.json", True),
        (".partial", True),
        ("train-0.tar", False),
        ("thesis.tex", False),
        ("my-train-000000.tar", False),
    ],
)
def test_what_belongs_to_a_data_set_is_known_by_name(name: str, own: bool) -> None:
    assert bool(OWN_NAMES.fullmatch(name)) == own
