"""Rows of parquet files and of folders that `save_to_disk` wrote."""

import datetime
import json
import os

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from easylm import storage
from easylm.data.sources import read_rows, read_values
from easylm.errors import InputError
from tests import bucket

datasets.disable_progress_bars()


def turns(name):
    return [{"role": "user", "content": name}, {"role": "assistant", "content": "é"}]


ROWS = [{"messages": turns(f"row{i}")} for i in range(5)]


def names(read):
    return [row.messages[0]["content"] for row in read.rows]


def write(path, rows, schema=None, **options):
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, **options)


def save(folder, rows=ROWS, **options):
    datasets.Dataset.from_list(rows).save_to_disk(folder, **options)


def test_parquet_rows_are_counted_over_row_groups(tmp_path):
    path = tmp_path / "rows.any"
    rows = [*ROWS, {"messages": [{"role": "bot", "content": "x"}]}, {"messages": None}]
    write(path, rows, row_group_size=2)
    read = read_rows(str(path), on_bad_row="skip")
    assert [row.messages for row in read.rows] == [row["messages"] for row in ROWS]
    assert [row.where for row in read.rows] == [f"{path}:row {i}" for i in range(1, 6)]
    with pytest.raises(InputError) as error:
        read_rows(str(path))
    assert str(error.value).startswith("2 of 7 rows of data.sources are bad:")
    assert f"{path}:row 6: messages[0].role: 'bot'; wanted one of system" in str(error.value)
    assert f"{path}:row 7: messages: null; wanted a list of messages" in str(error.value)


def test_counts_and_fractions_take_as_of_json(tmp_path):
    rows = [{"prompt": f"row{i}", "completion": "x"} for i in range(3000)]
    write(tmp_path / "a.parquet", rows)
    save(tmp_path / "saved", rows)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for amount in ("@0.01", "@2999", ""):
        chosen = [
            names(read_rows(f"{tmp_path}/{name}{amount}", seed=3))
            for name in ("a.parquet", "saved", "a.jsonl")
        ]
        assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == 3000


def test_fields_that_another_row_has_are_null(tmp_path):
    # A table has one set of columns, so a mixture of forms is filled up with nulls.
    path = tmp_path / "mixed.parquet"
    pair = {"instruction": "row0", "output": "é", "input": None}
    write(
        path,
        [pair, ROWS[1], {"id": 1}],
        pa.Table.from_pylist([{**pair, **ROWS[0], "id": 0}]).schema,
    )
    read = read_rows(str(path), on_bad_row="skip")
    assert [row.messages for row in read.rows] == [turns("row0"), turns("row1")]
    assert read.skipped.total() == 1


def test_all_kinds_of_text_become_str(tmp_path):
    text = ["row0", "é"]
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]
    kinds += [pa.dictionary(pa.int32(), pa.string()), pa.binary_view()]
    for kind in kinds:
        prompt = (
            pa.array(text).dictionary_encode().cast(kind)
            if pa.types.is_dictionary(kind)
            else pa.array([t.encode() if "binary" in str(kind) else t for t in text], kind)
        )
        table = pa.table({"prompt": prompt, "completion": prompt})
        with (
            pa.OSFile(f"{tmp_path}/rows", "wb") as file,
            parquet.ParquetWriter(file, table.schema) as writer,
        ):
            writer.write_table(table)
        assert [value for _, value, _ in read_values(f"{tmp_path}/rows")] == [
            {"prompt": t, "completion": t} for t in text
        ], kind


def test_a_struct_of_lists_is_a_list_of_structs(tmp_path):
    path = tmp_path / "rows.parquet"
    columns = {"role": ["user", "assistant"], "content": ["row0", "é"]}
    uneven = {"role": ["user", "assistant"], "content": ["row0"]}
    write(path, [{"messages": columns}, {"messages": uneven}, {"messages": None}])
    values = [value["messages"] for _, value, _ in read_values(str(path))]
    assert values == [turns("row0"), uneven, None]
    assert read_rows(str(path), on_bad_row="skip").skipped == {"messages is not a list": 2}


def test_other_values_are_left_as_python_has_them(tmp_path):
    when = datetime.datetime(2024, 1, 2)
    row = {"prompt": "a", "n": 1, "f": 0.5, "b": True, "none": None, "when": when, "l": [[1], None]}
    write(tmp_path / "rows", [row])
    assert [value for _, value, _ in read_values(f"{tmp_path}/rows")] == [row]


def test_texts_that_are_not_utf8_and_dates_beyond_python_are_bad_rows(tmp_path):
    bad_text = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.array([0, 1, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xffc")],
    )
    table = pa.table(
        {
            "prompt": bad_text,
            "completion": pa.array([b"x", b"y", b"z\xc3"]),
            "day": pa.array([0, 0, 0], pa.int32()).cast(pa.date32()),
        }
    )
    parquet.write_table(table, tmp_path / "rows")
    read = read_rows(f"{tmp_path}/rows", on_bad_row="skip")
    assert names(read) == ["a"] and read.skipped == {"not UTF-8": 2}
    with pytest.raises(InputError) as error:
        read_rows(f"{tmp_path}/rows")
    assert "row 2: prompt: byte 0xff at byte 2 of a text; wanted UTF-8 text" in str(error.value)
    assert "row 3: completion: byte 0xc3 at byte 2 of a text; wanted UTF-8" in str(error.value)
    day = pa.array([2**30], pa.int32()).cast(pa.date32())
    parquet.write_table(pa.table({"prompt": ["a"], "day": day}), tmp_path / "rows")
    with pytest.raises(InputError, match=r"row 1: day: .*; wanted text"):
        read_rows(f"{tmp_path}/rows")


def test_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    write(path, [{"prompt": f"{i}" * 99, "completion": "x"} for i in range(999)])
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(InputError, match=f"{path}: cannot be read .*copy it again"):
        read_rows(str(path), on_bad_row="skip")
    path.write_bytes(content[:4] + b"\xff" * 500 + content[504:])
    with pytest.raises(InputError, match=f"{path}: cannot be read .*copy it again"):
        read_rows(str(path), on_bad_row="skip")
    parquet.write_table(pa.table([["a"], ["b"]], ["prompt", "prompt"]), path)
    with pytest.raises(InputError, match=f"{path}: found two columns 'prompt'"):
        read_rows(str(path))
    write(path, [], pa.schema({"prompt": pa.string()}))
    with pytest.raises(InputError, match=f"no rows in {path}"):
        read_rows(str(path))


def test_a_saved_dataset(tmp_path):
    folder = tmp_path / "saved"
    save(folder, num_shards=3)
    assert names(read_rows(f"{folder}/")) == [f"row{i}" for i in range(5)]
    assert [row.where for row in read_rows(str(folder)).rows][3:] == [
        f"{folder}:row 4",
        f"{folder}:row 5",
    ]
    with pytest.raises(
        InputError, match=f"{folder}: no split 'test'; it has no splits. Write {folder}"
    ):
        read_rows(f"{folder}:test")
    first = sorted(folder.glob("*.arrow"))[0]
    first.write_bytes(first.read_bytes()[:200])
    with pytest.raises(InputError, match=f"{first}: cannot be read"):
        read_rows(str(folder))
    first.unlink()
    with pytest.raises(InputError, match=f"{first}: no such file, though state.json"):
        read_rows(str(folder))


def test_what_is_selected_and_mapped_before_saving_is_what_is_read(tmp_path):
    data = datasets.Dataset.from_list(ROWS).select([4, 2]).add_column("n", [1, 2])
    data.save_to_disk(tmp_path / "saved")
    assert names(read_rows(f"{tmp_path}/saved")) == ["row4", "row2"]


def test_splits_of_a_saved_dataset(tmp_path):
    folder = tmp_path / "saved"
    splits = {"train": ROWS[:3], "test": ROWS[3:]}
    data = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    data.save_to_disk(folder)
    assert (
        names(read_rows(str(folder)))
        == names(read_rows(f"{folder}:train"))
        == ["row0", "row1", "row2"]
    )
    assert [found.taken for found in read_rows(f"{folder}:test@1").found] == [1]
    assert read_rows(f"{folder}:test").rows[0].where == f"{folder}:test:row 1"
    with pytest.raises(
        InputError, match=f"no split 'dev'; it has 'test', 'train'. Write {folder}:test"
    ):
        read_rows(f"{folder}:dev")
    # One split of it is a folder of its own, and a name that exists wins over a split.
    assert names(read_rows(f"{folder}/test")) == ["row3", "row4"]
    os.rename(folder / "test", f"{folder}:test")
    assert names(read_rows(f"{folder}:test")) == ["row3", "row4"]
    (folder / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(InputError, match=r"none is called 'train'; it has 'test'. Write .*:test"):
        read_rows(str(folder))
    (folder / "dataset_dict.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset_dict.json: no JSON object"):
        read_rows(str(folder))


def test_arrow_data_in_a_bucket(tmp_path):
    write(tmp_path / "rows.parquet", ROWS, row_group_size=2)
    save(tmp_path / "saved", num_shards=2)
    (tmp_path / "cut").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-20])
    with bucket.running_bucket() as url:
        for place in (tmp_path / "rows.parquet", tmp_path / "cut", *(tmp_path / "saved").iterdir()):
            storage.write_bytes(f"{url}/{place.relative_to(tmp_path)}", place.read_bytes())
        for name in ("rows.parquet", "saved", "saved/"):
            assert names(read_rows(f"{url}/{name}")) == [f"row{i}" for i in range(5)]
        with pytest.raises(InputError, match=f"{url}/cut: cannot be read"):
            read_rows(f"{url}/cut")
        with pytest.raises(InputError, match=f"{url}/rows.parquets: .*mean {url}/rows.parquet?"):
            read_rows(f"{url}/rows.parquets")


def test_folders_that_are_no_source_say_what_they_hold(tmp_path):
    with pytest.raises(
        InputError, match=r"is a folder without rows \(it holds nothing\); wanted a f"
    ):
        read_rows(str(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").touch()
    with pytest.raises(InputError, match=r"without rows \(it holds README.md, sub/\)"):
        read_rows(str(tmp_path))
    for name in ("a.parquet", "b.parquet", "c.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"name the files: {tmp_path}/a.parquet,{tmp_path}/b.parq"):
        read_rows(str(tmp_path))
    with pytest.raises(
        InputError, match=f"{tmp_path}/c.json: no such file; did you mean .*c.jsonl"
    ):
        read_rows(f"{tmp_path}/c.json")
    with pytest.raises(InputError, match=f"no such file; nor is there a folder {tmp_path}/no"):
        read_rows(f"{tmp_path}/no/c.json")
    with pytest.raises(InputError, match=r"c.jsonl: is a file, and has no split 'train'"):
        read_rows(f"{tmp_path}/c.jsonl:train")
