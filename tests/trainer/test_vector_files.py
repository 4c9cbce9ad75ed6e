"""Files of vectors: any layout writes and any other reads, bit for bit; ranks one by one, on torch's fake group."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_ssam.trainer.vector_files import file_name, read_vectors, write_vectors

Layout = tuple[tuple[int, ...], tuple[Placement, ...]]
"""A mesh of ranks, and how a tensor lies on it; no ranks at all for a plain tensor."""

LAYOUTS: dict[str, Layout] = {
    "plain": ((), ()),
    "two": ((2,), (Shard(0),)),
    "three": ((3,), (Shard(0),)),
    "five": ((5,), (Shard(0),)),
    "columns": ((2,), (Shard(1),)),
    "replicated": ((2,), (Replicate(),)),
    "both": ((2, 2), (Shard(0), Shard(1))),
    "hybrid": ((2, 3), (Replicate(), Shard(0))),
    "nested": ((2, 2), (Shard(0), Shard(0))),
    "inner copies": ((3, 2), (Shard(1), Replicate())),
}
SHAPES = {"a/weight": (7, 5), "a/narrow": (1, 2), "a/wide": (2, 9, 3), "a/none": (0, 4)}


@contextlib.contextmanager
def as_rank(rank: int, layout: Layout) -> Iterator[DeviceMesh | None]:
    """Be one rank of the layout's mesh."""
    if not layout[0]:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(layout[0]))
    try:
        yield init_device_mesh("cpu", layout[0])
    finally:
        dist.destroy_process_group()


def part(whole: Tensor, rank: int, layout: Layout) -> Tensor:
    """What `torch.chunk` gives this rank, one dimension of the mesh after the other."""
    position = torch.unravel_index(torch.tensor(rank), layout[0]) if layout[0] else ()
    for at, size, placement in zip(position, *layout, strict=True):
        if isinstance(placement, Shard):
            pieces = whole.chunk(size, placement.dim)
            gone = whole.narrow(placement.dim, 0, 0)
            whole = pieces[at] if at < len(pieces) else gone
    return whole


def laid_out(whole: Tensor, rank: int, layout: Layout, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return whole.clone()
    return DTensor.from_local(
        part(whole, rank, layout).clone(),
        mesh,
        layout[1],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def ranks(layout: Layout) -> range:
    return range(math.prod(layout[0]))


def written(folder: Path, tensors: dict[str, Tensor], layout: Layout) -> int:
    files = len(ranks(layout))
    for rank in ranks(layout):
        with as_rank(rank, layout) as mesh:
            mine = {k: laid_out(t, rank, layout, mesh) for k, t in tensors.items()}
            write_vectors(folder / file_name(rank, files), mine, "id", plain=rank == 0)
    return files


def wholes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(shape, generator=generator) for k, shape in SHAPES.items()}


@pytest.mark.parametrize("reading", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("writing", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_reads_what_every_layout_wrote(tmp_path: Path, writing: Layout, reading: Layout):
    tensors = wholes()
    files = written(tmp_path, tensors, writing)
    for rank in ranks(reading):
        with as_rank(rank, reading) as mesh:

            def room(key, shape, dtype, rank=rank, mesh=mesh):
                return laid_out(torch.full(shape, math.nan, dtype=dtype), rank, reading, mesh)

            found = read_vectors(tmp_path, files, "id", room)
            assert found.keys() == tensors.keys()
            for key, tensor in found.items():
                here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                assert torch.equal(here, part(tensors[key], rank, reading)), (key, rank)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_entry_is_written_once(tmp_path: Path, layout: Layout):
    """Of a shard that several ranks hold, the first writes its copy."""
    tensors = wholes()
    files = written(tmp_path, tensors, layout)
    counts = dict.fromkeys(tensors, 0)
    for index in range(files):
        for key, t in load_file(tmp_path / file_name(index, files)).items():
            counts[key] += t.numel()
    assert counts == {k: t.numel() for k, t in tensors.items()}


def plain_room(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def round_trip(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    write_vectors(folder / file_name(0, 1), tensors, "id", plain=True)
    return read_vectors(folder, 1, "id", plain_room)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (1,), (4, 3), (0,), (2, 0)], ids=str)
def test_every_dtype_and_shape_round_trips(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    t = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    found = round_trip(tmp_path, {"s/x": t})["s/x"]
    assert (found.dtype, found.shape) == (dtype, t.shape)
    assert torch.equal(found.view(torch.uint8) if shape else found, t.view(torch.uint8) if shape else t)


def test_tensors_of_any_strides_and_shared_memory_round_trip(tmp_path: Path):
    """Transposed, channels-last, expanded, part of a larger one, and two names for one tensor."""
    x = torch.randn(4, 6)
    tensors = {
        "s/transposed": x.t(),
        "s/channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "s/expanded": torch.randn(1, 3).expand(4, 3),
        "s/rows": x[1:3],
        "s/columns": x[:, ::2],
        "s/one": x,
        "s/two": x,
    }
    found = round_trip(tmp_path, tensors)
    assert found.keys() == tensors.keys()
    for key in tensors:
        assert torch.equal(found[key], tensors[key]), key


def test_special_numbers_round_trip(tmp_path: Path):
    t = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    assert torch.equal(round_trip(tmp_path, {"s/x": t})["s/x"].view(torch.int32), t.view(torch.int32))


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("lost", range(3))
@pytest.mark.parametrize("reading", ["plain", "two"])
def test_a_missing_file_is_named_by_every_rank(tmp_path: Path, lost: int, reading: str):
    """Also by a rank that needs nothing of it."""
    files = written(tmp_path, wholes(), LAYOUTS["three"])
    (tmp_path / file_name(lost, files)).unlink()
    for rank in ranks(LAYOUTS[reading]):
        with (
            as_rank(rank, LAYOUTS[reading]),
            pytest.raises(ValueError, match=f"vectors-0000{lost + 1}-of-00003.safetensors is missing; restore it"),
        ):
            read_vectors(tmp_path, files, "id", plain_room)


@pytest.mark.parametrize("mixed", range(2))
def test_a_file_of_another_save_is_named(tmp_path: Path, mixed: int):
    files = written(tmp_path, wholes(), LAYOUTS["two"])
    with as_rank(mixed, LAYOUTS["two"]) as mesh:
        mine = {k: laid_out(t + 1, mixed, LAYOUTS["two"], mesh) for k, t in wholes().items()}
        write_vectors(tmp_path / file_name(mixed, files), mine, "other", plain=mixed == 0)
    with pytest.raises(
        ValueError, match=rf"0000{mixed + 1}-of-00002.safetensors belongs to another save \(other, not id"
    ):
        read_vectors(tmp_path, files, "id", plain_room)


def test_files_that_lack_a_shard_are_named(tmp_path: Path):
    """One rank's file in place of another's: every file is there and of one save, and half of the numbers is not."""
    files = written(tmp_path, wholes(), LAYOUTS["two"])
    first, second = (tmp_path / file_name(i, files) for i in range(2))
    second.unlink()
    second.write_bytes(first.read_bytes().replace(b"[0, 0]", b"[9, 9]"))
    with pytest.raises(ValueError, match=rf"{tmp_path.name} holds \d+ of the \d+ entries of `a/"):
        read_vectors(tmp_path, files, "id", plain_room)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shards"', b'"others"'),
        (b'"save_id"', b'"save_at"'),
        (b"torch.float32", b"torch.floatxy"),
        (b'\\"offset\\"', b'\\"offsot\\"'),
        (b'\\"shape\\"', b'\\"shope\\"'),
        (b"a/weight\\", b"a/weighs\\"),
    ],
    ids=str,
)
def test_a_header_that_lacks_something_is_named(tmp_path: Path, old: bytes, new: bytes):
    write_vectors(tmp_path / file_name(0, 1), wholes(), "id", plain=True)
    content = (tmp_path / file_name(0, 1)).read_bytes()
    assert old in content
    (tmp_path / file_name(0, 1)).write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match="vectors-00001-of-00001.safetensors is damaged .*; restore it, resume from"):
        read_vectors(tmp_path, 1, "id", plain_room)


def test_every_byte_that_is_cut_off_is_noticed(tmp_path: Path):
    file = tmp_path / file_name(0, 1)
    write_vectors(file, wholes(), "id", plain=True)
    content = file.read_bytes()
    for length in itertools.chain(range(0, len(content), 37), [len(content) - 1]):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="vectors-00001-of-00001.safetensors is damaged"):
            read_vectors(tmp_path, 1, "id", plain_room)
