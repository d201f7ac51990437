import io
import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.errors import RequestError
from kdsr.manifest import (
    ROW_GROUP_ROWS,
    DigestSet,
    Records,
    Report,
    Status,
    Task,
    list_tasks,
    run_id,
    statuses_to_table,
    table_to_statuses,
    table_to_tasks,
    task_id,
    tasks_to_table,
)
from kdsr.naming import Naming, Selection
from kdsr.store import ObjectInfo, open_store

RUN = "0123456789abcdef"


@pytest.fixture
def source(tmp_path):
    return open_store(str(tmp_path / "in"))


@pytest.fixture
def output(tmp_path):
    return open_store(str(tmp_path / "out"))


def tasks(source, output, run=RUN):
    return list(list_tasks(source, output_uri=output.uri, run=run))


def keys(source, output):
    return [task.key for task in tasks(source, output)]


def pending(output):
    table = pq.read_table(io.BytesIO(output.get(f"_kdsr/runs/{RUN}/pending.parquet")))
    return table["key"].to_pylist()


def done(task, info):
    return Status(task.id, task.key, task.target, "done", output_bytes=info.size, output_etag=info.etag)


# ---------------------------------------------------------------- identity


def test_the_same_command_is_the_same_run_and_any_other_is_not():
    run = run_id("file:///in", model_sha256="a", options={"quality": 95, "x": 1})
    assert run == run_id("file:///in", model_sha256="a", options={"x": 1, "quality": 95})
    others = {
        run_id("file:///other", model_sha256="a", options={"quality": 95, "x": 1}),
        run_id("file:///in", model_sha256="b", options={"quality": 95, "x": 1}),
        run_id("file:///in", model_sha256="a", options={"quality": 90, "x": 1}),
    }
    assert len(others | {run}) == 4


def test_another_content_under_the_same_key_is_another_task():
    info = ObjectInfo("a.jpg", 3, "etag")
    first = task_id(info, RUN, "a.png")
    assert first == task_id(ObjectInfo("a.jpg", 3, "etag"), RUN, "a.png")
    assert first != task_id(replace(info, etag="other"), RUN, "a.png")
    assert first != task_id(replace(info, key="b.jpg"), RUN, "a.png")
    assert first != task_id(info, "another run", "a.png")
    assert first != task_id(info, RUN, "a.jpg.png")


# ---------------------------------------------------------------- inputs and targets


def test_every_input_is_one_task(source, output):
    for key in ("b/c.png", "a.jpg", ".x.jpg", "notes.txt"):
        source.put(key, b"123")
    found = tasks(source, output)
    assert [task.key for task in found] == ["a.jpg", "b/c.png", "notes.txt"]
    assert all(task.target == task.key and task.size == 3 and task.etag for task in found)
    assert len({task.id for task in found}) == 3


def test_an_output_inside_the_input_is_not_listed(source):
    inner = source.child("results")
    for key in ("a.jpg", "results/a.jpg", "results/deep/b.jpg", "results2/c.jpg"):
        source.put(key, b"")
    assert keys(source, inner) == ["a.jpg", "results2/c.jpg"]


def test_an_output_that_is_the_input_is_refused(source, tmp_path):
    source.put("a.jpg", b"")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for uri in (source.uri, f"file://{tmp_path}/x/../in", f"file://{tmp_path}/link"):
        with pytest.raises(RequestError, match="is the input itself"):
            list(list_tasks(source, output_uri=uri, run=RUN))


def test_a_result_that_would_replace_an_input_is_refused(tmp_path):
    source, output = open_store(str(tmp_path / "pictures/raw")), open_store(str(tmp_path / "pictures"))
    source.put("a.jpg", b"")
    assert keys(source, output) == ["a.jpg"]
    source.put("raw/a.jpg", b"")
    with pytest.raises(RequestError, match=r"result of raw/a\.jpg"):
        tasks(source, output)


def test_an_empty_input_is_refused_and_leaves_nothing(source, output):
    with pytest.raises(RequestError, match="nothing to upscale"):
        Records(output, RUN).plan(list_tasks(source, output_uri=output.uri, run=RUN))
    assert list(output.list()) == []


# ---------------------------------------------------------------- planned minus done


@pytest.fixture
def three(source):
    for key in ("a.jpg", "b.jpg", "c.jpg"):
        source.put(key, b"123")


def plan(source, output):
    return Records(output, RUN).plan(list_tasks(source, output_uri=output.uri, run=RUN))


def test_a_first_start_has_everything_to_do(three, source, output):
    found = plan(source, output)
    assert (found.listed, found.skipped, found.pending) == (3, 0, 3)
    assert pending(output) == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_rerun_does_what_is_not_done(three, source, output):
    first, second, third = tasks(source, output)
    records = Records(output, RUN)
    records.append([done(first, output.put("a.jpg", b"result"))])
    records.append([Status(second.id, "b.jpg", "b.jpg", "failed", error_class="corrupt")])
    records.append([done(third, output.put("c.jpg", b"result"))])
    found = plan(source, output)
    assert (found.listed, found.skipped, found.pending) == (3, 2, 1)
    assert pending(output) == ["b.jpg"]
    manifest = pq.read_table(io.BytesIO(output.get(f"_kdsr/runs/{RUN}/manifest.parquet")))
    assert manifest["key"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_result_that_was_deleted_or_replaced_is_made_again(three, source, output):
    records = Records(output, RUN)
    records.append([done(task, output.put(task.target, b"result")) for task in tasks(source, output)])
    assert plan(source, output).pending == 0
    output.delete("a.jpg")
    output.put("b.jpg", b"of another model")
    assert plan(source, output).pending == 2
    assert pending(output) == ["a.jpg", "b.jpg"]


def test_an_input_that_changed_is_done_again(three, source, output):
    Records(output, RUN).append([done(task, output.put(task.target, b"")) for task in tasks(source, output)])
    source.put("b.jpg", b"something else")
    assert plan(source, output).pending == 1
    assert pending(output) == ["b.jpg"]


def test_two_starts_that_overlap_keep_both_their_rows(three, source, output):
    first, second, _ = tasks(source, output)
    one, other = Records(output, RUN), Records(output, RUN)
    one.append([done(first, output.put("a.jpg", b""))])
    other.append([done(second, output.put("b.jpg", b""))])
    assert plan(source, output).skipped == 2


def test_nothing_finished_writes_nothing(output):
    Records(output, RUN).append([])
    assert list(output.list()) == []


def test_more_tasks_than_a_row_group_are_streamed_into_several(output):
    many = (Task(f"{n:032x}", f"{n}.jpg", "etag", n, f"{n}.jpg") for n in range(ROW_GROUP_ROWS + 1))
    assert Records(output, RUN).plan(many).pending == ROW_GROUP_ROWS + 1
    manifest = pq.ParquetFile(io.BytesIO(output.get(f"_kdsr/runs/{RUN}/manifest.parquet")))
    assert manifest.metadata.num_row_groups == 2
    assert manifest.metadata.num_rows == ROW_GROUP_ROWS + 1


# ---------------------------------------------------------------- report


def report(**changes):
    sums = {"listed": 6, "done": 3, "skipped": 2, "failed": 1, "output_megapixels": 31.42, "seconds": 1.0}
    names = {"run": RUN, "input": "file:///in", "output": "file:///out", "model": "m", "model_sha256": "x"}
    return Report(**names, failed_keys={"ü.jpg": "corrupt (decode): cut"}, **sums | changes)


def test_the_report_is_json_with_the_sums_and_the_causes(output):
    Records(output, RUN).finish(report())
    found = json.loads(output.get(f"_kdsr/runs/{RUN}/report.json"))
    assert found["listed"] == found["done"] + found["skipped"] + found["failed"]
    assert found["failed_keys"] == {"ü.jpg": "corrupt (decode): cut"}


def test_an_earlier_report_goes_when_a_run_begins(three, source, output):
    Records(output, RUN).finish(report())
    plan(source, output)
    assert not output.exists(f"_kdsr/runs/{RUN}/report.json")


def test_a_run_is_ok_only_when_all_is_there():
    assert not report().ok
    assert report(failed=0, done=4).ok
    assert not report(failed=0, done=3).ok


def test_the_sentence_says_what_there_is():
    assert report().sentence() == (
        f"upscaled 3 images (31.4 Mpx), skipped 2, failed 1 (see file:///out/_kdsr/runs/{RUN}/report.json)"
    )
    assert "1 unaccounted for" in report(done=2).sentence()


def test_statuses_and_tasks_come_back_from_tables_as_they_were():
    tasks = [Task("0" * 32, "ü.jpg", "etag", 3, "ü.jpg")]
    assert table_to_tasks(tasks_to_table(tasks)) == tasks
    statuses = [Status("0" * 32, "ü.jpg", "ü.jpg", "failed", "decode", "corrupt", "cut", 1.5)]
    assert table_to_statuses(statuses_to_table(statuses)) == statuses


# ---------------------------------------------------------------- digests

digests = st.binary(min_size=16, max_size=16).map(bytes.hex)


@settings(max_examples=50)
@given(st.lists(digests), st.lists(digests))
def test_a_digest_set_holds_what_was_added_and_nothing_else(added, others):
    found = DigestSet()
    found.add(added[: len(added) // 2])
    found.contains(added)
    found.add(added[len(added) // 2 :])
    assert list(found.contains(added + others)) == [digest in set(added) for digest in added + others]


def test_digests_that_end_in_zero_bytes_are_told_apart():
    found = DigestSet()
    found.add(["ab" * 15 + "00"])
    assert list(found.contains(["ab" * 15 + "00", "ab" * 14 + "0000", "ab" * 16])) == [True, False, False]


# ---------------------------------------------------------------- a choice, a replay and a check


def test_the_number_type_is_chosen_once_for_a_run_and_its_reruns(output):
    assert Records(output, RUN).precision(lambda: "bfloat16") == "bfloat16"
    assert Records(output, RUN).precision(lambda: "float32") == "bfloat16"
    assert Records(output, "another run").precision(lambda: "float32") == "float32"


def test_only_what_failed_last_is_replayed(source, output):
    for key in ("a.jpg", "b.jpg", "c.jpg"):
        source.put(key, b"123")
    first, second, _ = tasks(source, output)
    records = Records(output, RUN)
    with pytest.raises(RequestError, match="nothing failed"):
        list(records.failed_only(tasks(source, output)))
    records.append([Status(task.id, task.key, task.target, "failed") for task in (first, second)])
    records.append([done(second, output.put("b.jpg", b"sr"))])
    assert list(Records(output, RUN).failed_only(tasks(source, output))) == [first]


def test_verify_names_results_that_are_gone_or_were_replaced(source, output):
    for key in ("a.jpg", "b.jpg", "c.jpg"):
        source.put(key, b"123")
    records = Records(output, RUN)
    records.append([done(task, output.put(task.target, b"sr")) for task in tasks(source, output)])
    assert records.num_done() == 3
    assert dict(records.verify()) == {}
    output.delete("a.jpg")
    output.put("b.jpg", b"something else")
    assert dict(records.verify()) == {"a.jpg": "missing", "b.jpg": "changed since"}


def test_verify_takes_the_row_of_a_later_start_for_a_result_that_was_done_again(source, output):
    source.put("a.jpg", b"123")
    (task,) = tasks(source, output)
    records = Records(output, RUN)
    records.append([done(task, output.put("a.jpg", b"first"))])
    records.append([done(task, output.put("a.jpg", b"second time"))])
    assert dict(records.verify()) == {}


def test_only_the_wanted_inputs_are_listed(source, output):
    for key in ("a.jpg", "b/c.jpg", "b/d.png", "b/e.jpg"):
        source.put(key, b"123")
    found = list_tasks(
        source,
        output_uri=output.uri,
        run=RUN,
        naming=Naming("png"),
        selection=Selection(include=("*.jpg",), exclude=("*/e*",)),
        limit=1,
    )
    assert [(task.key, task.target) for task in found] == [("a.jpg", "a.png")]
