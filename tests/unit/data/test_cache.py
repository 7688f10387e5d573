import dataclasses
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import remote
from pipeline.config import DataConfig, PreprocessConfig
from pipeline.data.cache import Prefetcher, ShardCache, ShardFetcher, fetcher_for, require_room
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.dataset import ShardDataset
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import DatasetManifest, ShardEntry, load_dataset
from pipeline.preprocess import PreprocessSpec, build_spec
from tests.s3 import Faults, faulty_proxy
from tests.web import web_server

SHARD_BYTES = 5000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def faults() -> Faults:
    """What goes wrong on the way; nothing unless a test says so."""
    return Faults()


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardEntry]:
    """Eight files on a web server."""
    (tmp_path / "web").mkdir()
    entries = []
    for number in range(8):
        content = bytes([number]) * SHARD_BYTES
        (tmp_path / "web" / f"{number}.tar").write_bytes(content)
        entries.append(ShardEntry(f"{number}.tar", 1, SHARD_BYTES, hashlib.sha256(content).hexdigest()))
    return entries


@pytest.fixture
def url(shards: list[ShardEntry], tmp_path: Path, faults: Faults) -> Iterator[str]:
    """The folder of the shards behind the proxy."""
    with web_server(tmp_path / "web") as port, faulty_proxy(port, faults) as proxy:
        yield f"http://127.0.0.1:{proxy}"


def fetcher(shards: list[ShardEntry], url: str, folder: Path, limit: int = 100 * SHARD_BYTES) -> ShardFetcher:
    return ShardFetcher(Path(), url, shards, ShardCache(folder / "cache", limit))


def held(folder: Path) -> int:
    """Bytes in the cache."""
    return sum(path.stat().st_size for path in (folder / "cache").iterdir() if path.suffix in (".tar", ".part"))


def test_a_shard_is_fetched_once(shards: list[ShardEntry], url: str, faults: Faults, tmp_path: Path) -> None:
    fetch = fetcher(shards, url, tmp_path)
    for _ in range(3):
        assert fetch(3).read_bytes() == b"\3" * SHARD_BYTES
    assert pickle.loads(pickle.dumps(fetch))(3).read_bytes() == b"\3" * SHARD_BYTES
    assert faults.log == [("/3.tar", "GET")]


def test_what_was_used_longest_ago_makes_room(shards: list[ShardEntry], url: str, faults: Faults, tmp_path: Path) -> None:
    fetch = fetcher(shards, url, tmp_path, limit=3 * SHARD_BYTES)
    for number in (0, 1, 2, 0, 3):
        fetch(number)
        time.sleep(0.002)  # times of use differ
        assert held(tmp_path) <= 3 * SHARD_BYTES
    faults.log.clear()
    for number in (0, 2, 3):
        fetch(number)
    assert faults.log == []
    fetch(1)
    assert faults.log == [("/1.tar", "GET")]


def test_a_reader_keeps_what_is_evicted_under_it(shards: list[ShardEntry], url: str, tmp_path: Path) -> None:
    fetch = fetcher(shards, url, tmp_path, limit=SHARD_BYTES)
    with fetch(0).open("rb") as file:
        fetch(1)
        assert file.read() == b"\0" * SHARD_BYTES


def _read_all(fetch: ShardFetcher, order: list[int], failed: "multiprocessing.sharedctypes.Synchronized[int]") -> None:
    for number in order:
        for _ in range(20):
            try:
                content = fetch(number).read_bytes()
                break
            except FileNotFoundError:  # evicted between the two
                continue
        if content != bytes([number]) * SHARD_BYTES:
            failed.value += 1


def test_processes_share_a_cache_and_keep_its_bound(shards: list[ShardEntry], url: str, faults: Faults, tmp_path: Path) -> None:
    faults.share_failing = 0.1
    context = multiprocessing.get_context("fork")
    failed = context.Value("i", 0)
    fetch = fetcher(shards, url, tmp_path, limit=3 * SHARD_BYTES)
    orders = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 1, 3, 5, 7]]
    processes = [context.Process(target=_read_all, args=(fetch, order * 3, failed)) for order in orders]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        try:
            largest = max(largest, held(tmp_path))
        except FileNotFoundError:
            continue
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert failed.value == 0
    assert 0 < largest <= 3 * SHARD_BYTES


def test_one_of_several_processes_fetches_and_the_others_wait(
    shards: list[ShardEntry], url: str, faults: Faults, tmp_path: Path
) -> None:
    faults.slow_seconds = 0.3
    context = multiprocessing.get_context("fork")
    failed = context.Value("i", 0)
    fetch = fetcher(shards, url, tmp_path)
    processes = [context.Process(target=_read_all, args=(fetch, [5], failed)) for _ in range(4)]
    for process in processes:
        process.start()
    while not faults.log and any(process.is_alive() for process in processes):
        assert fetch.fetch(5, wait=False) is None or faults.log  # somebody else is at it
        time.sleep(0.01)
    for process in processes:
        process.join(20)
    assert failed.value == 0
    assert faults.log == [("/5.tar", "GET")]


def test_what_a_killed_process_left_is_no_shard_and_is_cleared_away(
    shards: list[ShardEntry], url: str, faults: Faults, tmp_path: Path
) -> None:
    faults.slow_seconds = 5
    context = multiprocessing.get_context("fork")
    fetch = fetcher(shards, url, tmp_path, limit=2 * SHARD_BYTES)
    process = context.Process(target=fetch, args=(0,))
    process.start()
    while not list((tmp_path / "cache").glob("*.part")):
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    faults.slow_seconds = 0
    assert list((tmp_path / "cache").glob("*.part"))
    fetch(1), fetch(2)
    assert not list((tmp_path / "cache").glob("*.part"))
    assert fetch(0).read_bytes() == b"\0" * SHARD_BYTES


def test_a_shard_whose_bytes_are_wrong_is_refused_and_not_kept(
    shards: list[ShardEntry], url: str, faults: Faults, tmp_path: Path
) -> None:
    faults.corrupt_always = lambda path: path == "/2.tar"
    fetch = fetcher(shards, url, tmp_path)
    with pytest.raises(DataError, match=r"2\.tar: its sha256 is not the manifest's"):
        fetch(2)
    assert held(tmp_path) == 0


def test_shards_are_fetched_ahead_of_their_use_within_half_the_cache(
    shards: list[ShardEntry], url: str, faults: Faults, tmp_path: Path
) -> None:
    used = 0.0
    fetch = fetcher(shards, url, tmp_path, limit=6 * SHARD_BYTES)
    prefetcher = Prefetcher(fetch, iter(range(8)), lambda: used).start()
    time.sleep(0.5)
    assert sorted(path for path, _ in faults.log) == ["/0.tar", "/1.tar", "/2.tar", "/3.tar"]
    used = 0.5
    time.sleep(0.5)
    assert len(faults.log) == 8
    prefetcher.stop()


def test_a_cache_that_cannot_hold_what_is_read_at_one_time_is_refused(tiny_dataset: DatasetManifest) -> None:
    remote_set = dataclasses.replace(tiny_dataset, url="s3://bucket/tiny")
    require_room(remote_set, DataConfig())
    require_room(tiny_dataset, DataConfig(cache_gigabytes=1e-9))  # everything is here
    with pytest.raises(ConfigError, match=r"`data\.cache_gigabytes` is 1e-06, but two windows of 8 shards .* need 0\.0"):
        require_room(remote_set, DataConfig(cache_gigabytes=1e-6))


# ---- a whole data set at a URL ----


@pytest.fixture
def published(tiny_dataset: DatasetManifest, tmp_path: Path, faults: Faults) -> Iterator[str]:
    """The tiny data set at a URL, behind the proxy."""
    with web_server(tiny_dataset.folder) as port, faulty_proxy(port, faults) as proxy:
        yield f"http://127.0.0.1:{proxy}"


def test_a_remote_data_set_gives_the_batches_of_the_local_one(
    published: str, tiny_dataset: DatasetManifest, faults: Faults, tmp_path: Path
) -> None:
    faults.share_failing = 0.1
    faults.cut_once = lambda path: path.endswith(".tar")
    config = DataConfig(global_batch_size=8, shuffle_shards=2, cache_dir=str(tmp_path), num_workers=2, start_method="fork")
    manifest = load_dataset(published, config.cache_folder)
    assert (manifest.digest, manifest.url) == (tiny_dataset.digest, published)
    assert not [path for path, _ in faults.log if path.endswith(".tar")]  # training starts before shards have come
    spec = build_spec(PreprocessConfig(resize=[8, 8]), manifest.image_stats)
    loaders = [ShardDataModule(one, spec, config, seed=1).train_dataloader() for one in (manifest, tiny_dataset)]
    for here, there in zip(*loaders, strict=True):
        assert here["image"].equal(there["image"])
        assert here["index"].equal(there["index"])
    assert [what for _, what in faults.log].count("cut") == len(tiny_dataset.split("train").shards)


def test_a_data_set_that_changed_gets_another_mirror(
    copied_dataset: DatasetManifest, tmp_path: Path, tiny_spec: PreprocessSpec
) -> None:
    with web_server(copied_dataset.folder) as port:
        url = f"http://127.0.0.1:{port}"
        first = load_dataset(url, tmp_path / "mirrors")
        dataclasses.replace(copied_dataset, class_names=["a", "b", "c"]).save()
        second = load_dataset(url, tmp_path / "mirrors")
        assert first.folder != second.folder
        assert second.class_names == ["a", "b", "c"]
        shutil.rmtree(copied_dataset.folder)
        with pytest.raises(DataError, match=r"dataset\.json: is not there"):
            load_dataset(url, tmp_path / "mirrors")


def test_shards_may_be_remote_where_the_manifest_is_not(
    published: str, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, tmp_path: Path
) -> None:
    shutil.copytree(tiny_dataset.folder, tmp_path / "here", ignore=shutil.ignore_patterns("val*.tar"))
    split = tiny_dataset.split("val")
    entries = [dataclasses.replace(shard, name=f"{published}/{shard.name}") for shard in split.shards]
    splits = {**tiny_dataset.splits, "val": dataclasses.replace(split, shards=entries)}
    dataclasses.replace(tiny_dataset, splits=splits, folder=tmp_path / "here").save()
    manifest = load_dataset(tmp_path / "here")
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    assert fetcher_for(manifest, "train", config) is None
    ours = ShardDataset(manifest, "val", tiny_spec, config=config)
    theirs = ShardDataset(tiny_dataset, "val", tiny_spec)
    assert [ours.encoded(index) for index in range(12)] == [theirs.encoded(index) for index in range(12)]
