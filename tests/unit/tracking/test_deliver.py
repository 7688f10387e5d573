import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from PIL import Image

from pipeline.cli import main
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.files import locked
from pipeline.manifest import DatasetManifest
from pipeline.run import RunRecord
from pipeline.tracking import deliver as deliver_module
from pipeline.tracking.deliver import Delivery, batches, deliver, deliver_now, describe_trouble, left_over
from pipeline.tracking.journal import Journal
from pipeline.tracking.provenance import describe_dataset
from pipeline.tracking.run import RunTracker
from pipeline.tracking.server import Place, Server, place_of
from tests.processes import wait_until

if TYPE_CHECKING:
    from mlflow.entities import Run

Open = Callable[[], RunTracker]
Deliver = Callable[[], Delivery]
GONE = Server("http://127.0.0.1:9", "shardline")  # nobody listens to the port of "discard"


def run_of(delivery: Delivery) -> "Run":
    return delivery.sender.client.get_run(delivery.sender.run_id)


def history(delivery: Delivery, key: str) -> list[tuple[int, float]]:
    """(step, value) of every point that the database holds, oldest first."""
    points = delivery.sender.client.get_metric_history(delivery.sender.run_id, key)
    return [(point.step, point.value) for point in points]


def artifacts(delivery: Delivery, folder: str) -> list[str]:
    return [info.path for info in delivery.sender.client.list_artifacts(delivery.sender.run_id, folder)]


def forget(config: Config) -> None:
    """As if the last call had been answered by nobody, though the server had heard it."""
    place = place_of(config.run_dir)
    place.delivered = {}
    place.run_id = None
    place.save(config.run_dir)


def test_a_job_has_one_run_however_often_it_is_opened_and_delivered(
    config: Config, record: RunRecord, open_here: Open, deliver_here: Deliver
) -> None:
    open_here().finish("KILLED")
    first = deliver_here()
    forget(config)
    open_here()
    second = deliver_here()
    assert first.place.run_id == second.place.run_id
    query = f"tags.`shardline.job_id` = '{record.job_id}'"
    assert len(second.sender.client.search_runs([str(second.place.experiment_id)], query)) == 1
    assert run_of(second).info.status == "RUNNING"


def test_a_run_that_a_timed_out_request_made_in_the_end_stays_the_only_one(
    config: Config, record: RunRecord, server: Server, open_here: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = open_here()
    first = deliver_now(config.run_dir, server)
    tracker.finish()
    forget(config)
    delivery = Delivery(config.run_dir, server)
    search = delivery.sender._runs_of
    answers: list[list[str]] = [[]]  # as long as the first request is not served
    monkeypatch.setattr(delivery.sender, "_runs_of", lambda job_id: answers.pop() if answers else search(job_id))
    delivery.round()
    assert delivery.place.run_id == first.run_id
    assert search(record.job_id) == [first.run_id]


def test_sending_everything_again_changes_nothing(config: Config, open_here: Open, deliver_here: Deliver) -> None:
    tracker = open_here()
    for step in range(1, 4):
        tracker.log({"train/loss": 1.0 / step}, step)
    tracker.log_final({"test/accuracy": 0.75})
    pixels = config.run_dir / "pixels.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(pixels)
    tracker.log_image("val/samples", pixels.read_bytes(), 2)
    tracker.log_table("tables/wrong.json", {"image": ["pixels.png"], "true": ["cat"]}, images=["image"])
    tracker.log_file(pixels, "plots")
    delivery = deliver_here()
    assert delivery.is_done, delivery.place.trouble
    pictures, cells = artifacts(delivery, "images"), artifacts(delivery, "table_images")
    forget(config)
    delivery = deliver_here()
    assert delivery.is_done
    assert history(delivery, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert history(delivery, "test/accuracy") == [(0, 0.75)]
    assert artifacts(delivery, "images") == pictures
    assert artifacts(delivery, "table_images") == cells
    assert len(pictures) == 2, "whole, and small for the page"
    assert artifacts(delivery, "plots") == ["plots/pixels.png"]
    table = json.loads(Path(delivery.sender.client.download_artifacts(delivery.sender.run_id, "tables/wrong.json")).read_text())
    assert table["columns"] == ["image", "true"]
    assert len(table["data"]) == 1


def test_more_points_than_mlflow_takes_go_in_several_calls(config: Config, open_here: Open, deliver_here: Deliver) -> None:
    tracker = open_here()
    for step in range(700):
        tracker.log({"train/loss": float(step), "train/accuracy": 1.0}, step)
    sizes = [len(entries) for entries, _ in batches(config.run_dir / "tracking/points.jsonl", 0)]
    assert sizes == [1, 1, 500, 200]
    delivery = deliver_here()
    assert [step for step, _ in history(delivery, "train/loss")] == list(range(700))


def test_what_mlflow_refuses_is_set_aside_and_holds_up_nothing(config: Config, open_here: Open, deliver_here: Deliver) -> None:
    tracker = open_here()
    journal = Journal(config.run_dir / "tracking/points.jsonl")
    journal.add({"points": [["good", 1.0, 5, 1], ["b?d", 2.0, 5, 1], ["also good", 3.0, 5, 1]]})
    journal.add({"tags": {"after": "it"}})
    tracker.log_image("b?d", b"", 1)
    delivery = deliver_here()
    assert history(delivery, "good") == [(1, 1.0)]
    assert history(delivery, "also good") == [(1, 3.0)]
    assert run_of(delivery).data.tags["after"] == "it"
    assert delivery.place.refused == 1
    (line,) = (config.run_dir / "tracking/refused.jsonl").read_text().splitlines()
    assert json.loads(line)["entry"] == {"points": [["b?d", 2.0, 5, 1]]}


def test_a_deleted_run_takes_nothing_and_loses_nothing(config: Config, open_here: Open, deliver_here: Deliver) -> None:
    tracker = open_here()
    delivery = deliver_here()
    client, run_id = delivery.sender.client, delivery.sender.run_id
    client.delete_run(run_id)
    tracker.log({"train/loss": 1.0}, 1)
    delivery.round()
    assert not delivery.is_done
    assert delivery.place.refused == 0
    client.restore_run(run_id)
    delivery.try_again()
    delivery.round()
    assert delivery.is_done
    assert history(delivery, "train/loss") == [(1, 1.0)]


def test_a_full_artifact_store_does_not_hold_up_the_points(
    config: Config, open_here: Open, deliver_here: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = open_here()
    note = config.run_dir / "note.txt"
    note.write_text("kept")
    tracker.log_file(note, "evaluation")
    tracker.log({"train/loss": 1.0}, 1)
    from mlflow import MlflowClient

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", refuse)
        delivery = deliver_here()
    assert history(delivery, "train/loss") == [(1, 1.0)]
    assert "No space left on device" in delivery.place.trouble
    assert left_over(config.run_dir) == "1 files"
    delivery.try_again()
    delivery.round()
    assert delivery.is_done
    assert delivery.place.trouble == ""
    assert artifacts(delivery, "evaluation") == ["evaluation/note.txt"]


def test_a_server_that_is_not_there_is_left_alone_for_longer_and_longer(
    config: Config, open_here: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_here()
    delivery = Delivery(config.run_dir, GONE)
    waits = []
    for _ in range(8):
        delivery.round()
        patience = delivery.patience["points.jsonl"]
        waits.append(round(patience.next_try - time.monotonic()))
        patience.next_try = 0.0
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    assert delivery.has_given_up
    assert delivery.place.trouble.startswith("MLflow at http://127.0.0.1:9 cannot be reached (")


def test_a_server_that_hangs_is_asked_once_a_round(config: Config, open_here: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = open_here()
    tracker.log_file(config.run_dir / "run.json")
    asked = []

    def hang(self: Delivery, path: Path) -> None:
        asked.append(path.name)
        raise RuntimeError("Read timed out. (read timeout=30)")

    monkeypatch.setattr(Delivery, "_send", hang)
    delivery = Delivery(config.run_dir, GONE)
    delivery.place.run_id = "a"
    delivery.round()
    assert asked == ["points.jsonl"]


def test_another_server_gets_everything(config: Config, open_here: Open, deliver_here: Deliver, tmp_path: Path) -> None:
    tracker = open_here()
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    first = deliver_here()
    other = Server(f"sqlite:///{tmp_path}/other.db", "elsewhere", (tmp_path / "artifacts").as_uri())
    place = deliver_now(config.run_dir, other)
    assert (place.experiment, place.uri) == ("elsewhere", other.uri)
    assert place.run_id != first.place.run_id
    assert other.client().get_run(str(place.run_id)).data.metrics == {"train/loss": 1.0}


def test_sync_says_what_it_could_not_deliver_and_that_a_job_is_at_work(config: Config, open_here: Open) -> None:
    tracker = open_here()
    tracker.log({"train/loss": 1.0}, 1)
    with pytest.raises(RunError, match=r"cannot be reached .*Still in .*: 1 points, 2 facts\. Run `shardline sync`"):
        deliver_now(config.run_dir, GONE)
    with locked(config.run_dir / "tracking"), pytest.raises(RunError, match="locked by another job"):
        deliver_now(config.run_dir, GONE)


def test_a_training_that_left_no_word_of_its_end_is_shown_as_killed(config: Config, server: Server, open_here: Open) -> None:
    open_here()
    place = deliver_now(config.run_dir, server)
    assert server.client().get_run(str(place.run_id)).info.status == "KILLED"
    open_here().finish("FINISHED")
    deliver_now(config.run_dir, server)
    assert server.client().get_run(str(place.run_id)).info.status == "FINISHED"


def test_a_run_folder_that_is_moved_aside_is_still_its_own(
    config: Config, server: Server, open_here: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = open_here()
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    aside = config.run_dir.with_name(f"{config.name}.aside")
    rounds: list[float] = []

    def has_ended(seconds: float) -> bool:
        if not rounds:
            config.run_dir.rename(aside)
            Journal(config.run_dir / "tracking/points.jsonl").add({"tags": {"of": "another run"}})
        rounds.append(seconds)
        return len(rounds) > 2

    monkeypatch.setattr(deliver_module, "_has_ended", has_ended)
    deliver(config.run_dir, server, sample=False)
    place = place_of(aside)
    assert place.delivered == {"points.jsonl": (aside / "tracking/points.jsonl").stat().st_size}
    assert not (config.run_dir / "tracking/delivered.json").exists()
    assert "of" not in server.client().get_run(str(place.run_id)).data.tags


def test_a_run_says_what_was_trained_on_what(
    config: Config, record: RunRecord, server: Server, deliver_here: Deliver, tiny_dataset: DatasetManifest
) -> None:
    tracker = RunTracker(config.run_dir, server)
    tracker.begin(config, record, "SCHEDULED", describe_dataset(tiny_dataset))
    tracker.begin(config, record, None, describe_dataset(tiny_dataset))
    delivery = deliver_here()
    assert delivery.is_done, delivery.place.trouble
    run = run_of(delivery)
    assert run.info.run_name == config.name
    assert run.info.status == "SCHEDULED"
    assert run.data.params["channels"] == "[8, 16]"
    assert run.data.params["momentum"] == "0.5"
    assert run.data.params["seed"] == "1999"
    assert run.data.tags["shardline.data_digest"] == "d" * 64
    assert (run.data.tags["mlflow.source.git.commit"], run.data.tags["git.dirty"]) == ("0" * 40, "true")
    assert run.inputs is not None
    shown = {each.tags[0].value: json.loads(each.dataset.profile or "") for each in run.inputs.dataset_inputs}
    assert shown.keys() == tiny_dataset.splits.keys()
    train = tiny_dataset.splits["train"]
    assert shown["train"]["class_counts"] == dict(zip(tiny_dataset.class_names, train.class_counts, strict=True))
    text = Path(delivery.sender.client.download_artifacts(delivery.sender.run_id, "config.yaml")).read_text()
    assert "channels:\n  - 8\n  - 16\n" in text


def test_a_parameter_that_changed_is_told_as_a_tag(
    config: Config, record: RunRecord, server: Server, open_here: Open, deliver_here: Deliver
) -> None:
    open_here()
    deliver_here()
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=0.5))
    RunTracker(config.run_dir, server).begin(changed, record, "RUNNING", [])
    run = run_of(deliver_here())
    assert run.data.params["lr"] == str(config.optimizer.lr)
    assert run.data.tags["changed.lr"] == f"{config.optimizer.lr} -> 0.5"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("API request failed with error code 401 != 200", "asks for a name and a password"),
        ("error code 403 != 200", "does not permit it"),
        ("host='127.0.0.1', port=54013): Connection refused", "cannot be reached"),
        ("HTTPConnectionPool(...): Read timed out. (read timeout=30)", "does not answer"),
        ("[Errno 111] Connection refused", "cannot be reached"),
        ("too many 500 error responses", "does not take it"),
        ("for url http://ann:secret@host/api", "does not take it (for url http://***@host/api)"),
    ],
)
def test_trouble_is_told_in_a_line_without_passwords(error: str, words: str) -> None:
    said = describe_trouble(RuntimeError(f"{error}\nand more"), "http://host")
    assert said.startswith("MLflow at http://host ")
    assert words.removesuffix(")") in said
    assert "secret" not in said
    assert "\n" not in said


def test_a_run_whose_database_was_thrown_away_is_made_anew(config: Config, server: Server, open_here: Open) -> None:
    tracker = open_here()
    tracker.log({"train/loss": 1.0}, 1)
    before = deliver_now(config.run_dir, server)
    lost = dataclasses.replace(before, run_id="0" * 32)
    lost.save(config.run_dir)
    tracker.log({"train/loss": 0.5}, 2)
    tracker.finish()
    place = deliver_now(config.run_dir, server)
    assert place.run_id == before.run_id, "found by its job"
    points = server.client().get_metric_history(str(place.run_id), "train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5)]


def test_a_full_disk_does_not_end_the_process_that_delivers(
    config: Config, open_here: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: object, run_dir: Path) -> None:
        raise OSError(28, "No space left on device")

    open_here()
    delivery = Delivery(config.run_dir, GONE)
    monkeypatch.setattr(Place, "save", refuse)
    delivery.round()
    assert "cannot be reached" in delivery.place.trouble


def test_a_run_folder_that_was_renamed_is_delivered_to_its_own_run_from_anywhere(
    config: Config, record: RunRecord, server: Server, open_here: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative = dataclasses.replace(config, runs_dir="runs")
    tracker = open_here()
    deliver_now(config.run_dir, server)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    renamed = config.run_dir.rename(config.run_dir.with_name(f"{config.name}.20261126-034500"))
    (renamed / "config.yaml").write_text(yaml.safe_dump(relative.as_dict()))
    monkeypatch.chdir(tmp_path)
    assert main(["sync", str(renamed)]) == 0
    place = place_of(renamed)
    assert place.uri == server.uri
    assert server.client().get_run(str(place.run_id)).data.metrics == {"train/loss": 1.0}
    assert not list(tmp_path.iterdir())


def test_sync_leaves_the_record_as_another_verb_made_it_meanwhile(
    config: Config, record: RunRecord, server: Server, open_here: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_here().finish()
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))

    def deliver_slowly(run_dir: Path, to: Server) -> Place:
        record.outcome = "done"
        record.save()
        return deliver_now(run_dir, to)

    monkeypatch.setattr(deliver_module, "deliver_now", deliver_slowly)
    assert main(["sync", str(config.run_dir)]) == 0
    after = RunRecord.require(config.run_dir)
    assert (after.outcome, after.mlflow["uri"]) == ("done", server.uri)


def test_a_run_that_nothing_was_tracked_of_is_not_said_to_be_delivered(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is nothing to deliver"):
        deliver_now(tmp_path, GONE)


def test_the_process_that_delivers_outlives_the_signals_that_stop_a_job(
    config: Config, server: Server, open_here: Open
) -> None:
    tracker = open_here()
    tracker.start_delivery()
    process = tracker._deliverer
    assert process is not None
    wait_until(lambda: place_of(config.run_dir).run_id is not None, "the run", seconds=60)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        process.send_signal(number)
    tracker.finish("KILLED")
    assert process.wait(timeout=60) == 0
    assert server.client().get_run(str(place_of(config.run_dir).run_id)).info.status == "KILLED"
