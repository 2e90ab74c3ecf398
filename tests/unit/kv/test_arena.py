from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
from pathlib import Path

import pytest

from kvferry.errors import ConfigError, HostError
from kvferry.kv.arena import Arena, ArenaInfo
from kvferry.kv.segment import Segment

HOLDER = """
import sys
from pathlib import Path
from kvferry.kv.arena import Arena
folder, is_named = Path(sys.argv[1]), sys.argv[2] == "named"
arena = Arena.create(engine_id="holder", num_slots=2, slot_bytes=4096, directory=folder, is_named=is_named)
print(arena.info.path, flush=True)
sys.stdin.read()
"""
VISITOR = """
import sys
from kvferry.kv.arena import Arena, ArenaInfo
path, num_slots, slot_bytes, nonce = sys.argv[1:]
arena = Arena.attach(ArenaInfo(path, int(num_slots), int(slot_bytes), bytes.fromhex(nonce)))
print(bytes(arena.slot_view(1)[:5]).decode(), arena.generation(1), flush=True)
arena.slot_view(2)[:4] = b"back"
"""


def test_slots_are_distinct_aligned_and_zero(make_arena) -> None:
    arena = make_arena(num_slots=3, slot_bytes=8192)
    for slot in range(3):
        view = arena.slot_view(slot)
        assert len(view) == 8192
        assert not any(view)
        assert arena.slot_address(slot) == arena.address + slot * 8192
        assert arena.slot_address(slot) % 4096 == 0
        view[:] = bytes([slot + 1]) * 8192
    for slot in range(3):
        assert ctypes.string_at(arena.slot_address(slot), 8192) == bytes([slot + 1]) * 8192


@pytest.mark.parametrize("slot", [-1, 3])
def test_no_slot_outside(make_arena, slot: int) -> None:
    arena = make_arena(num_slots=3)
    for call in (arena.slot_view, arena.slot_address, arena.generation, arena.bump):
        with pytest.raises(IndexError, match="outside"):
            call(slot)


def test_the_file_is_private_and_named_on_demand_after_engine_and_process(tmp_path: Path, make_arena) -> None:
    assert Path(make_arena().info.path).stat().st_mode & 0o777 == 0o600
    assert list((tmp_path / "arena").iterdir()) == []
    arena = Arena.create(engine_id="a/b c", num_slots=1, slot_bytes=4096, directory=tmp_path, is_named=True)
    path = Path(arena.info.path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert (path.parent, path.name[: -len("0123456789abcdef")]) == (tmp_path, f"kvferry-abc-{os.getpid()}-")
    arena.close()
    assert not path.exists()


def test_generations_rise_one_by_one_and_are_shared(make_arena) -> None:
    owner = make_arena()
    visitor = Arena.attach(owner.info)
    assert owner.generation(2) == visitor.generation(2) == 0
    assert [owner.bump(2), owner.bump(2)] == [1, 2]
    assert visitor.generation(2) == 2
    assert visitor.generation(1) == visitor.generation(3) == 0
    visitor.close()


def test_another_process_reads_writes_and_does_not_unlink(make_arena, kit) -> None:
    arena = make_arena()
    arena.slot_view(1)[:5] = b"hello"
    arena.bump(1)
    info: ArenaInfo = arena.info
    child = kit.spawn(VISITOR, info.path, info.num_slots, info.slot_bytes, info.nonce.hex())
    out, _ = child.communicate(timeout=30)
    assert (out, child.returncode) == ("hello 1\n", 0)
    assert bytes(arena.slot_view(2)[:4]) == b"back"
    assert os.path.exists(info.path)


def test_attaching_survives_the_owner_closing(make_arena) -> None:
    owner = make_arena()
    visitor = Arena.attach(owner.info)
    owner.slot_view(0)[:3] = b"abc"
    owner.close()
    assert not os.path.exists(owner.info.path)
    assert bytes(visitor.slot_view(0)[:3]) == b"abc"
    visitor.close()


def test_attach_refuses_what_is_gone_or_another(make_arena) -> None:
    info = make_arena().info
    with pytest.raises(HostError, match="not the announced arena"):
        Arena.attach(dataclasses.replace(info, nonce=b"x" * 16))
    with pytest.raises(HostError, match="not the announced arena"):
        Arena.attach(dataclasses.replace(info, num_slots=info.num_slots + 1000))
    with pytest.raises(HostError, match="another machine"):
        Arena.attach(dataclasses.replace(info, path=info.path + "x"))


def test_close_is_idempotent_and_keeps_views_alive(make_arena) -> None:
    arena = make_arena()
    view = arena.slot_view(0)
    view[:2] = b"ok"
    arena.close()
    arena.close()
    assert bytes(view[:2]) == b"ok"
    with pytest.raises(ValueError, match="closed"):
        arena.slot_view(0)


def test_arenas_of_the_dead_are_swept_those_of_the_living_are_not(tmp_path: Path, kit) -> None:
    folder = tmp_path / "shared"
    children = [kit.spawn(HOLDER, folder, "named") for _ in range(2)]
    paths = [child.stdout.readline().strip() for child in children]
    stranger = folder / "kvferry-not-ours"
    stranger.write_bytes(b"")
    assert all(os.path.exists(path) for path in paths)
    children[0].send_signal(signal.SIGKILL)
    children[0].communicate(timeout=30)
    assert os.path.exists(paths[0])
    mine = Arena.create(engine_id="next", num_slots=1, slot_bytes=4096, directory=folder)
    assert [os.path.exists(path) for path in paths] == [False, True]
    assert stranger.exists()
    mine.close()
    children[1].communicate(timeout=30)


def test_nothing_is_left_of_a_killed_owner_without_a_name(tmp_path: Path, kit) -> None:
    folder = tmp_path / "shared"
    child = kit.spawn(HOLDER, folder, "unnamed")
    path = child.stdout.readline().strip()
    assert os.stat(path).st_size == ArenaInfo(path, 2, 4096, b"").total_bytes, "it is there"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    assert list(folder.iterdir()) == []
    with pytest.raises(HostError, match="owner has ended"):
        Arena.attach(ArenaInfo(path, 2, 4096, bytes(16)))


def test_who_was_attached_sweeps_what_a_dead_owner_left(tmp_path: Path, kit) -> None:
    child = kit.spawn(HOLDER, tmp_path, "named")
    path = child.stdout.readline().strip()
    header = Path(path).read_bytes()[:48]
    num_bytes = os.stat(path).st_size
    early, late = (Segment.attach(path, num_bytes, header, what="arena") for _ in range(2))
    early.close()
    assert os.path.exists(path), "its owner lives"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    assert os.path.exists(path)
    late.close()
    assert not os.path.exists(path)


@pytest.mark.parametrize("directory", [None, "given"])
def test_no_room_names_need_and_remedies_and_leaves_nothing(tmp_path: Path, directory: str | None) -> None:
    folder = tmp_path / directory if directory else None
    with pytest.raises(ConfigError) as caught:
        Arena.create(engine_id="huge", num_slots=1 << 20, slot_bytes=1 << 30, directory=folder)
    for word in (str((1 << 50) + (10 << 20)), "bytes are free", "cpu_bytes_to_use", "--shm-size", "arena_dir"):
        assert word in str(caught.value)
    assert not list((folder or Path("/dev/shm")).glob("kvferry-huge-*"))


@pytest.mark.parametrize(("num_slots", "slot_bytes"), [(0, 4096), (1, 0), (1, 4097), (1, 100)])
def test_slots_must_be_pages(tmp_path: Path, num_slots: int, slot_bytes: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 4096"):
        Arena.create(engine_id="x", num_slots=num_slots, slot_bytes=slot_bytes, directory=tmp_path)


@pytest.mark.parametrize("folder", ["/proc/kvferry", "/dev/null/kvferry"])
def test_unusable_folder(folder: str) -> None:
    with pytest.raises(ConfigError, match="arena_dir"):
        Arena.create(engine_id="x", num_slots=1, slot_bytes=4096, directory=Path(folder))


def test_default_is_shared_memory() -> None:
    arena = Arena.create(engine_id="x", num_slots=1, slot_bytes=4096)
    assert os.readlink(arena.info.path).startswith("/dev/shm/kvferry-x-")
    arena.close()
