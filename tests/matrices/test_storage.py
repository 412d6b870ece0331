"""Tensor files: bytes that the safetensors library agrees with; damage is always a CheckpointError."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import mmap
import os
import subprocess
import sys
import weakref
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import CheckpointError, GossamerError, OutputError
from gossamer.matrices import atomic
from gossamer.matrices.checksums import CHUNK, Digest, checksums_of, damaged_chunks
from gossamer.matrices.storage import LazyTensor, open_tensors, write_tensors
from gossamer.matrices.tensor_header import DTYPES


def example_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, sizes that divide by 64 and sizes that do not, scalars and empties."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        raw = torch.randint(0, 2, (24 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        tensors[f"a.{name}"] = raw.view(dtype).reshape(4, 6)
        tensors[f"b.{name}"] = torch.zeros(64, dtype=dtype)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["one"] = torch.tensor([7], dtype=torch.uint8)
    tensors["empty"] = torch.zeros(0, 3)
    tensors["tëxt/名"] = torch.arange(6, dtype=torch.int64).reshape(2, 3).T  # not contiguous
    return tensors


def rewrite(path: Path, header: bytes | dict, data: bytes) -> Path:
    """A file with any header and data, lengths consistent."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def split(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    tensors = example_tensors()
    write_tensors(tmp_path / "x.safetensors", tensors, metadata={"format": "pt"})
    theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor)


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in example_tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "1", "b": "2"})
    ours = open_tensors(tmp_path / "x.safetensors")
    assert ours.metadata == {"a": "1", "b": "2"}
    assert set(ours.names) == set(tensors)
    for name, tensor in tensors.items():
        assert ours.shape(name) == tuple(tensor.shape)
        assert ours.dtype(name) == tensor.dtype
        assert torch.equal(ours.tensor(name), tensor)


def test_alignment_order_and_fixed_bytes(tmp_path):
    tensors = example_tensors()
    backwards = dict(reversed(tensors.items()))
    written = write_tensors(tmp_path / "a", tensors)
    assert written == write_tensors(tmp_path / "b", backwards)
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes()
    assert written.file.size == len(raw)
    assert written.file.sha256 == hashlib.sha256(raw).hexdigest()
    assert written.file == checksums_of(tmp_path / "a")
    file = open_tensors(tmp_path / "a")
    whole = [name for name in file.names if (tensors[name].numel() * tensors[name].itemsize) % 64 == 0]
    assert file.names[: len(whole)] == sorted(whole)
    for name, entry in file.entries.items():
        assert entry.begin % (64 if name in whole else entry.dtype.itemsize) == 0
        assert zlib.crc32(raw[entry.begin : entry.end]) == written.crc32[name]
        assert bytes(file.bytes_of(name)) == raw[entry.begin : entry.end]
        if entry.end > entry.begin:
            assert file.at(entry.begin, entry.begin + 1) == [name]
            assert file.at(entry.end - 1, entry.end) == [name]
    assert file.at(0, 8) == []
    assert set(file.at(0, len(raw))) == set(tensors) - {"empty"}


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3)), max_size=12
    )
)
def test_any_tensors_survive_in_both_libraries(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("any") / "x"
    tensors = {
        str(index): torch.randint(0, 2, shape).to(DTYPES[kind]) for index, (kind, shape) in enumerate(shapes)
    }
    write_tensors(path, tensors)
    theirs = safetensors.torch.load_file(path)
    ours = open_tensors(path)
    assert set(ours.names) == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(ours.tensor(name), tensor)
        assert torch.equal(theirs[name], tensor)


def test_a_tensor_outlives_its_file_object_and_never_writes_to_the_file(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.arange(64, dtype=torch.float32)})
    before = (tmp_path / "x").read_bytes()
    tensor = open_tensors(tmp_path / "x").tensor("a")
    gc.collect()
    tensor[:] = -1
    assert torch.equal(tensor, torch.full((64,), -1.0))
    assert (tmp_path / "x").read_bytes() == before
    assert open_tensors(tmp_path / "x").tensor("a")[5] == 5


def test_reading_maps_instead_of_copying(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.arange(64), "b": torch.arange(64, 128)})
    file = open_tensors(tmp_path / "x")
    first, second = file.tensor("a"), file.tensor("a")
    assert first.data_ptr() == second.data_ptr()
    assert file.tensor("b").data_ptr() - first.data_ptr() == file.entry("b").begin - file.entry("a").begin
    assert first.data_ptr() % 64 == 0


def test_huge_pages_hold_a_copy_of_the_same_tensors(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, example_tensors())
    mapped, copied = open_tensors(path), open_tensors(path, huge_pages=True)
    wanted = {name: mapped.tensor(name).clone() for name in mapped.names}
    del mapped
    path.write_bytes(b"")  # the copy does not need the file, which a map would
    for name, tensor in wanted.items():
        assert torch.equal(copied.tensor(name), tensor), name


def test_huge_pages_are_asked_for_and_may_be_refused(tmp_path, monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(errno.EINVAL, "Invalid argument")

    path = tmp_path / "t.safetensors"
    write_tensors(path, example_tensors())
    monkeypatch.setattr("gossamer.matrices.storage.mmap.mmap", Refusing)
    assert open_tensors(path, huge_pages=True).data == path.read_bytes()


def test_unaligned_tensors_of_other_tools_are_read(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    data = bytes([1, 2, 3]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    file = open_tensors(rewrite(tmp_path / "x", header, data))
    assert file.tensor("b").tolist() == [1.5, -2.0]
    header["b"]["dtype"] = "BOOL"
    header["b"]["shape"] = [8]
    with pytest.raises(CheckpointError, match=r"'b'.*other than 0 and 1"):
        open_tensors(rewrite(tmp_path / "x", header, data)).tensor("b")


def test_lazy_tensors_are_made_one_at_a_time_and_checked(tmp_path):
    alive: list[str] = []

    def make(name: str):
        def load():
            assert not alive, "two lazy tensors at once"
            tensor = torch.full((64,), float(len(name)))
            alive.append(name)
            weakref.finalize(tensor, alive.remove, name)
            return tensor

        return LazyTensor(torch.float32, (64,), load)

    write_tensors(tmp_path / "x", {name: make(name) for name in ("a", "bb", "ccc")})
    assert open_tensors(tmp_path / "x").tensor("ccc")[0] == 3.0
    wrong = LazyTensor(torch.float32, (3,), lambda: torch.zeros(4))
    with pytest.raises(OutputError, match="'w' was announced"):
        write_tensors(tmp_path / "y", {"w": wrong})
    again = open_tensors(tmp_path / "x")
    write_tensors(tmp_path / "z", {name: again.lazy(name) for name in again.names})
    assert (tmp_path / "z").read_bytes() == (tmp_path / "x").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["x", "z"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        ({"c": torch.zeros(2, dtype=torch.complex64)}, None, "complex64"),
        ({"__metadata__": torch.zeros(2)}, None, "cannot be named"),
        ({"a": torch.zeros([1] * 9)}, None, "9 dimensions"),
        ({"a": torch.zeros(1)}, {"x": "1", "y": "2"}, "at most one metadata key"),
    ],
)
def test_what_cannot_be_written_says_so(tmp_path, tensors, metadata, match):
    with pytest.raises(OutputError, match=match):
        write_tensors(tmp_path / "x", tensors, metadata=metadata)
    assert os.listdir(tmp_path) == []


def entry(kind="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}


BAD_HEADERS = {
    "empty object with data": (b"{}", "4 bytes follow"),
    "not json": (b'{"a":', "damaged"),
    "not utf-8": (b'{"\xff":1}', "damaged"),
    "array": (b"[]", "begin with"),
    "leading space": (b" {}", "begin with"),
    "trailing text": (b'{"a":1}x', "damaged"),
    "deep nesting": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "duplicate tensor": (
        b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2),
        "'a' appears twice",
    ),
    "duplicate field": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "'dtype'"),
    "number": ({"a": 1}, "'a' is not described"),
    "missing field": ({"a": {"dtype": "U8", "shape": [4]}}, "'a' is not described"),
    "extra field": ({"a": {**entry(), "x": 1}}, "'a' is not described"),
    "unknown dtype": ({"a": entry("U9")}, "'a' has the dtype 'U9'"),
    "dtype of a wrong type": ({"a": entry([])}, "'a' has the dtype"),
    "negative shape": ({"a": entry(shape=(-2, -2))}, "'a' has the shape"),
    "float shape": ({"a": entry(shape=(4.0,))}, "'a' has the shape"),
    "bool shape": ({"a": entry(shape=(True, 4))}, "'a' has the shape"),
    "huge shape": ({"a": entry(shape=(2**62, 2**62))}, "'a' has the impossible shape"),
    "shape that wraps to 4": ({"a": entry(shape=(2**62 + 1, 4))}, "'a' has the impossible shape"),
    "declared giant": ({"a": entry(shape=(2**62,), offsets=(0, 2**62))}, "'a' ends at byte"),
    "huge beside zero": ({"a": entry(shape=(2**62, 2**62, 0))}, "'a' has the impossible shape"),
    "rank": ({"a": entry(shape=(1,) * 9)}, "'a' has the shape"),
    "infinite": (b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,4]}}', "'a' has the shape"),
    "constant": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', "NaN"),
    "many digits": (
        b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 9999),
        "damaged",
    ),
    "negative offset": ({"a": entry(offsets=(-4, 0))}, "'a' has the data_offsets"),
    "backwards": ({"a": entry(offsets=(4, 0))}, "'a' of shape"),
    "three offsets": ({"a": entry(offsets=(0, 2, 4))}, "'a' has the data_offsets"),
    "size": ({"a": entry(shape=(3,))}, "'a' of shape"),
    "past the end": ({"a": entry(shape=(8,), offsets=(0, 8))}, "'a' ends at byte"),
    "hole before": ({"a": entry(shape=(3,), offsets=(1, 4))}, "'a' leaves a hole after the header"),
    "hole between": (
        {"a": entry(shape=(1,), offsets=(0, 1)), "b": entry(shape=(2,), offsets=(2, 4))},
        "'b' leaves a hole after the tensor 'a'",
    ),
    "overlap": (
        {"a": entry(shape=(3,), offsets=(0, 3)), "b": entry(shape=(2,), offsets=(2, 4))},
        "'b' overlaps the tensor 'a'",
    ),
    "same place twice": ({"a": entry(), "b": entry()}, "'b' overlaps the tensor 'a'"),
    "bytes left over": ({"a": entry(shape=(3,), offsets=(0, 3))}, "1 bytes follow"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, "not a table of strings"),
    "metadata list": ({"__metadata__": [], "a": entry()}, "not a table of strings"),
    "lone surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[3],"data_offsets":[0,4]}}', "udc?800"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_name_the_file_and_the_tensor(tmp_path, case):
    header, match = BAD_HEADERS[case]
    path = rewrite(tmp_path / "model.safetensors", header, b"\1\2\3\4")
    with pytest.raises(CheckpointError, match=match) as caught:
        open_tensors(path)
    assert "model.safetensors" in str(caught.value)
    str(caught.value).encode()  # printable


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"\0" * 7,
        b"\0" * 8,
        b"\1" + b"\0" * 7 + b"{",
        b"\xff" * 16,
        (3).to_bytes(8, "little") + b"{}",
        (2**62).to_bytes(8, "little") + b"{}",
        (100_000_001).to_bytes(8, "little") + b"{}",
    ],
)
def test_bad_lengths(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(CheckpointError, match="x"):
        open_tensors(tmp_path / "x")


def test_what_is_no_file(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError):
            open_tensors(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="not a regular file"):
            open_tensors(tmp_path / "pipe")
    write_tensors(tmp_path / "x", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        open_tensors(tmp_path / "x").tensor("b")


def test_every_truncation_and_any_header_flip(tmp_path):
    tensors = {"a": torch.arange(16), "b": torch.ones(5, dtype=torch.uint8), "c": torch.ones(2, 3)}
    write_tensors(tmp_path / "x", tensors)
    raw = (tmp_path / "x").read_bytes()
    damaged = tmp_path / "damaged"
    for length in range(len(raw)):
        damaged.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_tensors(damaged)
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for bit in range(8 * header_end):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << (bit % 8)
        damaged.write_bytes(flipped)
        try:
            file = open_tensors(damaged)
        except CheckpointError:
            continue
        for name in file.names:  # a flip may give another valid header (a name, a dtype of that size)
            assert file.tensor(name).nbytes <= len(raw)


@settings(max_examples=150, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**64) | st.floats() | st.sampled_from(["U8", "F32", "a"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner),
    max_leaves=12,
))  # fmt: skip
def test_any_json_as_a_header(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "x"
    rewrite(path, json.dumps(value).encode(), b"\0" * 8)
    with pytest.raises(CheckpointError):
        open_tensors(path)


def test_full_disk_says_what_was_needed_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")
    real = atomic.open if hasattr(atomic, "open") else open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "open", lambda *args: Full(real(*args)), raising=False)
    with pytest.raises(OutputError, match=r"No space left.*4,\d\d\d bytes are needed, [\d,]+ are free"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(1024)})
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
def test_a_real_limit_of_the_system(tmp_path):
    code = """
import resource, sys, torch
from pathlib import Path
from gossamer.errors import OutputError
from gossamer.matrices.storage import write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
write_tensors(Path(sys.argv[1]) / "small", {"a": torch.zeros(1000)})
try:
    write_tensors(Path(sys.argv[1]) / "large", {"a": torch.zeros(100_000)})
except OutputError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "400,128 bytes are needed" in result.stdout
    assert os.listdir(tmp_path) == ["small"]


def test_a_missing_or_forbidden_folder(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        write_tensors(tmp_path / "no" / "x", {"a": torch.zeros(1)})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(GossamerError, match="cannot write"):
        write_tensors(tmp_path / "file" / "x", {"a": torch.zeros(1)})


def test_atomic_folder(tmp_path):
    out = tmp_path / "out"
    with atomic.atomic_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    with pytest.raises(OutputError, match="nothing is overwritten"), atomic.atomic_folder(out):
        pytest.fail("the block must not run")

    def interrupted():
        with atomic.atomic_folder(tmp_path / "b") as folder:
            (folder / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (tmp_path / "empty").mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "left over").write_text("1")
    with atomic.atomic_folder(tmp_path / "empty", scratch=scratch) as folder:
        assert folder == scratch
        (folder / "a").write_text("2")
    assert os.listdir(tmp_path / "empty") == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "out"]


def test_the_current_folder_is_no_output(tmp_path, monkeypatch):
    for name in ("here", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", tmp_path / "here"):
        with (
            pytest.raises(OutputError, match="is the current folder"),
            atomic.atomic_folder(path, scratch=tmp_path / "scratch"),
        ):
            pytest.fail("the block must not run")
    assert (tmp_path / "scratch").exists()
    atomic.check_free(tmp_path / "scratch")


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"

    def overtaken():
        with atomic.atomic_folder(out) as folder:
            (folder / "a").write_text("mine")
            out.mkdir()
            (out / "a").write_text("theirs")

    with pytest.raises(OutputError, match="nothing is overwritten"):
        overtaken()
    assert (out / "a").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.integers(0, 2 * CHUNK + 3), max_size=4), seed=st.integers(0, 9))
def test_digest_is_that_of_the_whole(pieces, seed):
    data = bytes((index * 31 + seed) % 251 for index in range(257))
    whole, digest = b"", Digest()
    for size in pieces:
        part = (data * (size // len(data) + 1))[:size]
        whole += part
        digest.update(part)
    result = digest.result()
    assert result.size == len(whole)
    assert result.sha256 == hashlib.sha256(whole).hexdigest()
    assert list(result.crc32) == [zlib.crc32(whole[at : at + CHUNK]) for at in range(0, len(whole), CHUNK)]
    assert damaged_chunks(memoryview(whole), result.crc32) == []
    if whole:
        flipped = bytearray(whole)
        flipped[-1] ^= 1
        assert damaged_chunks(memoryview(flipped), result.crc32) == [len(result.crc32) - 1]
        assert damaged_chunks(memoryview(whole), result.crc32[:-1]) == [len(result.crc32) - 1]
