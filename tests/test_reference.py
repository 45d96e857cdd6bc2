"""Stored reference log-probabilities go to the pairs they are of, and come back whole or not."""

import os
import subprocess
import sys

import numpy as np
import pytest

from easylm import storage
from easylm.errors import InputError
from easylm.reference import ReferenceParts, ReferenceTable
from tests import bucket

# Close together and beyond float64's 53 bits, where a detour over it would confuse them.
IDS = np.array([2**64 - 1, 3, 2**63 + 2, 2**63 + 1, 7], np.uint64)


def table(ids, chosen, rejected=None):
    chosen = np.asarray(chosen, np.float32)
    rejected = -chosen if rejected is None else np.asarray(rejected, np.float32)
    return ReferenceTable(np.asarray(ids, np.uint64), chosen, rejected)


def check(found, expected):
    for name in ("ids", "chosen", "rejected"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


@pytest.fixture(scope="module")
def bucket_url():
    with bucket.running_bucket() as url:
        yield url


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    """A folder to write below, on a disk and in a bucket."""
    if request.param == "disk":
        return str(tmp_path)
    name = request.node.name.replace("[", "-").replace("]", "")
    return f"{request.getfixturevalue('bucket_url')}/{name}"


def test_pairs_are_looked_up_in_any_order():
    made = table(IDS, [1, 2, 3, 4, 5], [10, 20, 30, 40, 50])
    assert len(made) == 5 and made.ids.tolist() == sorted(IDS.tolist())
    chosen, rejected = made.lookup(IDS)
    assert chosen.tolist() == [1, 2, 3, 4, 5] and rejected.tolist() == [10, 20, 30, 40, 50]
    chosen, rejected = made.lookup(IDS[[4, 1, 1, 3]])
    assert chosen.tolist() == [5, 2, 2, 4] and rejected.tolist() == [50, 20, 20, 40]
    assert chosen.dtype == rejected.dtype == np.float32
    assert [len(values) for values in made.lookup(IDS[:0])] == [0, 0]


def test_what_is_missing_is_told():
    made = table(IDS[:3], [1, 2, 3])
    asked = IDS[[0, 3, 1, 4, 3]]
    assert made.has(asked).tolist() == [True, False, True, False, False]
    with pytest.raises(
        InputError,
        match=r"3 of 5 pairs have no .* \(the first has the id 8000000000000001\)",
    ):
        made.lookup(asked)
    assert not ReferenceTable.empty().has(IDS).any()
    with pytest.raises(InputError, match="5 of 5 pairs"):
        ReferenceTable.empty().lookup(IDS)


def test_the_first_entry_of_a_pair_counts():
    check(table([5, 3, 5, 3], [1, 2, 3, 4]), table([3, 5], [2, 1]))
    one, other = table([5, 3], [1, 2]), table([9, 3, 1], [3, 4, 5])
    check(one.merge(other), table([1, 3, 5, 9], [5, 2, 1, 3]))
    check(other.merge(one), table([1, 3, 5, 9], [5, 4, 1, 3]))
    check(ReferenceTable.empty().merge(one), one)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(FloatingPointError, match=r"gives 2 of 3 pairs .* not finite"):
        table([1, 2, 3], [bad, 0, 0], [bad, 0, bad])


def test_other_types_are_refused():
    numbers = np.zeros(2, np.float32)
    made = table([1, 2], [0, 0])
    for ids in (np.array([1, 2]), np.array([[1, 2]], np.uint64)):
        with pytest.raises(ValueError, match="wanted uint64, one axis"):
            ReferenceTable(ids, numbers, numbers)
        with pytest.raises(ValueError, match="wanted uint64, one axis"):
            made.has(ids)
    for values in (numbers.astype(np.float64), numbers[:1], numbers[None]):
        for columns in ((values, numbers), (numbers, values)):
            with pytest.raises(ValueError, match=r"wanted float32\(2,\), one for each id"):
                ReferenceTable(made.ids, *columns)


def test_a_table_comes_back_as_it_was(root):
    path = f"{root}/run/below/reference.npz"
    made = table(IDS, [1e-30, -2.5, 3, -1e30, 5])
    with pytest.raises(InputError, match=r"reference\.npz: no such (file|object)"):
        ReferenceTable.load(path)
    made.save(path)
    loaded = ReferenceTable.load(path)
    check(loaded, made)
    assert list(storage.list_files(f"{root}/run/below")) == ["reference.npz"]
    # Whoever wants to look at it needs numpy alone.
    if not storage.is_bucket(root):
        with np.load(path) as arrays:
            assert arrays["chosen"].tolist() == made.chosen.tolist()
    # Another one takes its place.
    ReferenceTable.empty().save(path)
    loaded = ReferenceTable.load(path)
    check(loaded, ReferenceTable.empty())


def test_equal_tables_are_equal_files(tmp_path):
    table(IDS, [1, 2, 3, 4, 5]).save(f"{tmp_path}/a")
    table(IDS[::-1], [5, 4, 3, 2, 1]).save(f"{tmp_path}/b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ReferenceParts("~/parts").add("0", table([1], [2]))
    check(ReferenceParts("~/parts").load(), table([1], [2]))
    assert os.listdir(tmp_path / "parts") == ["0.npz"]


@pytest.mark.parametrize("pairs", [5, 5000])
def test_any_damage_is_an_error(tmp_path, pairs):
    path = tmp_path / "reference.npz"
    made = table(np.arange(pairs), np.arange(pairs))
    made.save(str(path))
    whole = path.read_bytes()
    # All of a small file; of a larger one, what says of which type and length the ids are.
    start, end = (0, len(whole)) if pairs == 5 else (whole.index(b"ids.npy"), 600)
    damaged = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    damaged.append(b"not one of ours")
    for place in range(start, end):
        for bits in (0x04, 0xFF):
            changed = bytearray(whole)
            changed[place] ^= bits
            damaged.append(bytes(changed))
    harmless = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            loaded = ReferenceTable.load(str(path))
        except InputError as error:
            assert f"{path}: the stored reference log-probabilities are damaged (" in str(error)
        else:
            check(loaded, made)
            harmless += 1
    # Dates and the like, which nobody reads; a small file is mostly headers.
    assert harmless < len(damaged) / 3


@pytest.mark.parametrize("name", ["ids", "chosen", "rejected"])
@pytest.mark.parametrize("instead", [None, IDS[:2], np.array("{")], ids=["none", "ids", "text"])
def test_another_kind_of_file_is_damage(tmp_path, name, instead):
    numbers = np.zeros(5, np.float32)
    arrays = {"ids": IDS, "chosen": numbers, "rejected": numbers}
    del arrays[name]
    np.savez(tmp_path / "a.npz", **arrays, **({} if instead is None else {name: instead}))
    with pytest.raises(InputError, match=r"a\.npz: the stored .* are damaged \("):
        ReferenceTable.load(f"{tmp_path}/a.npz")


def test_numbers_that_are_not_finite_are_damage(tmp_path):
    numbers = np.full(5, np.nan, np.float32)
    np.savez(tmp_path / "a.npz", ids=IDS, chosen=numbers, rejected=numbers)
    with pytest.raises(InputError, match=r"a\.npz: the stored .* are damaged .*not finite"):
        ReferenceTable.load(f"{tmp_path}/a.npz")


def test_parts_are_one_table(root):
    parts = ReferenceParts(f"{root}/parts/")
    check(parts.load(), ReferenceTable.empty())
    parts.add("b", table([5, 3], [1, 2]))
    parts.add("a", table([9, 3], [3, 4]))
    parts.add("c", table([1], [9]))
    storage.write_bytes(f"{root}/parts/notes.txt", b"")
    check(parts.load(), table([1, 3, 5, 9], [9, 4, 1, 3]))
    parts.add("a", table([9], [8]))
    check(ReferenceParts(f"{root}/parts").load(), table([1, 3, 5, 9], [9, 2, 1, 8]))


def test_a_damaged_part_is_named(root):
    parts = ReferenceParts(f"{root}/parts")
    parts.add("a", table([5, 3], [1, 2]))
    parts.add("b", table([9], [1]))
    data = storage.read_bytes(f"{root}/parts/b.npz")
    storage.write_bytes(f"{root}/parts/b.npz", data[:-1])
    with pytest.raises(InputError, match=r"/parts/b\.npz: .* are damaged .*delete this file"):
        parts.load()


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "parts").write_bytes(b"")
    with pytest.raises(InputError, match=r"/parts/a\.npz: exists already|a file where a folder"):
        ReferenceParts(f"{tmp_path}/parts").add("a", table([1], [1]))


KILLED = """
import os, signal, sys
import numpy as np
from easylm.reference import ReferenceParts, ReferenceTable

os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
one = np.ones(1, np.float32)
ReferenceParts(sys.argv[1]).add("b", ReferenceTable(np.ones(1, np.uint64), one, one))
"""


def test_a_part_that_was_interrupted_is_absent(tmp_path, monkeypatch):
    parts = ReferenceParts(str(tmp_path))
    parts.add("a", table([5], [1]))
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert process.returncode == -9 and len(os.listdir(tmp_path)) == 2
    check(parts.load(), table([5], [1]))

    def interrupted(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parts.add("a", table([5], [2]))
    assert len(os.listdir(tmp_path)) == 2
    check(parts.load(), table([5], [1]))


def test_a_missing_bucket_is_named(bucket_url):
    parts = ReferenceParts("gs://nobody-has-made-this/parts")
    check(parts.load(), ReferenceTable.empty())
    with pytest.raises(InputError, match=r"gs://nobody-has-made-this/parts/a\.npz: no such object"):
        parts.add("a", table([5], [1]))


WRITER = """
import sys
import numpy as np
from easylm.reference import ReferenceParts, ReferenceTable

parts = ReferenceParts(sys.argv[1])
for i in range(40):
    ids = np.arange(1000, dtype=np.uint64) + np.uint64(1000 * (i % 4))
    values = ids.astype(np.float32)
    parts.add(str(i % 4), ReferenceTable(ids, values, -values))
"""


def test_two_write_the_same_names_while_one_reads(root):
    parts = ReferenceParts(f"{root}/parts")
    command = [sys.executable, "-c", WRITER, f"{root}/parts"]
    writers = [subprocess.Popen(command) for _ in range(2)]
    seen = []
    while any(writer.poll() is None for writer in writers):
        found = parts.load()
        assert len(found) % 1000 == 0
        assert found.chosen.tolist() == found.ids.astype(np.float32).tolist()
        seen.append(len(found))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen == sorted(seen) and len(parts.load()) == 4000
    assert list(storage.list_files(f"{root}/parts")) == ["0.npz", "1.npz", "2.npz", "3.npz"]


def test_many_ids_take_no_time_to_find():
    ids = np.random.default_rng(0).permutation(100_000).astype(np.uint64) << np.uint64(40)
    made = table(ids, np.arange(100_000))
    order = np.random.default_rng(1).permutation(100_000)
    assert made.lookup(ids[order])[0].tolist() == order.tolist()
