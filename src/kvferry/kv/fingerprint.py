"""Fingerprint of a model: one changed byte of config or weights is another model, in every host.

SHA-256 over, for `config.json` (adapters: `adapter_config.json` too), then each `*.safetensors`, then what else
weights and their meaning may come from (index files; then the files that these and `config.json` name, `*.bin`,
`*.pt`, `*.pth`, the model's own `*.py`, and every `*.json` that is not known to be of the tokenizer, such as those
that describe how weights are quantised), each in name order: u32-LE length of the file name, the name, u64-LE size,
and the file's bytes. Folders over 8 GiB, whose files several threads read: in place of each file's bytes the SHA-256
of them, and it begins with "files:".
Results are cached by path and stamp (size, mtime, ctime and inode) of every file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvferry.config import cache_dir
from kvferry.errors import ConfigError

logger = logging.getLogger(__name__)

LARGE_FOLDER_BYTES = 8 << 30
_NUM_THREADS = 8
_READ_BYTES = 8 << 20
_MAX_LINKS = 40
_CONFIGS = ("config.json", "adapter_config.json")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.py", "*.json")
_HARMLESS_JSON = frozenset(
    ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
     "chat_template.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
     "video_preprocessor_config.json", "trainer_state.json", "all_results.json", "train_results.json",
     "eval_results.json", "config_sentence_transformers.json", "modules.json")
)  # fmt: skip
"""Of tokenizers, samplers and training. Media processors have a fingerprint of their own, which is not the weights'."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def fingerprint_folder(folder: Path, progress: Progress | None = None) -> str:
    """The fingerprint of a model or LoRA folder (hex, with a prefix saying how it was made). Reads all weights once.

    Raises ConfigError when the folder holds no safetensors weights, or they change while they are read.
    """
    files = _files(folder)
    stamp = [_stamp(file) for file in files]
    memo = cache_dir() / "fingerprints" / (hashlib.sha256(str(folder.resolve()).encode()).hexdigest() + ".json")
    known = _recall(memo, stamp)
    if known is not None:
        return known
    total = sum(file.stat().st_size for file in files)
    is_large = total > LARGE_FOLDER_BYTES
    hasher = hashlib.sha256()
    done = 0
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        contents = threads.map(_digests, files) if is_large else map(_pieces, files)
        for file, pieces in zip(files, contents, strict=True):
            size = file.stat().st_size
            hasher.update(struct.pack("<I", len(file.name.encode())) + file.name.encode() + struct.pack("<Q", size))
            for piece in pieces:
                hasher.update(piece)
                done += size if is_large else len(piece)
                if progress is not None:
                    progress(done, total)
    if stamp_folder(folder) != stamp:
        raise ConfigError(f"files in {str(folder)!r} changed while they were read: start again when they are complete")
    result = ("files:" if is_large else "sha256:") + hasher.hexdigest()
    _remember(memo, stamp, result)
    return result


def stamp_folder(folder: Path) -> list[list[object]]:
    """What changes when one of the files does that `fingerprint_folder` reads. Cheap; errors are as there."""
    return [_stamp(file) for file in _files(folder)]


def newest_change_s(folder: Path, *, is_strict: bool, files: Iterable[Path] | None = None) -> float:
    """When this path led to other bytes last, at the latest (seconds since the epoch, by the file system's clock).

    That is the newest change of the files (those above, if none are given), of the folder, and of each name on the way
    to them. A rename changes the time of what it moves and of the folder around it, so a name has not changed since the
    older of the two. Where both are new, a folder may have been renamed, or other things only came and went in it:
    `is_strict` takes it as renamed; otherwise it is, when its times say that nothing came or went in it last.
    """
    places = [folder, *(_files(folder) if files is None else files)]
    inodes_s = max(place.stat().st_ctime for place in places)
    return max(inodes_s, *(_name_changed_s(step, is_strict) for place in places for step in _steps(place)))


def stamp_files(files: Iterable[Path]) -> list[list[object]]:
    """What changes when one of them does, comes or goes."""
    return [_stamp(file) for file in files if file.is_file()]


def stamp_way(folder: Path) -> list[list[object]]:
    """What changes when the path begins to lead to another folder, or something in the folder comes or goes."""
    way = [[str(step), *_inode(step)] for step in _steps(folder)]
    return [*way, [str(folder), folder.stat().st_ctime_ns]]


def _inode(step: Path) -> list[object]:
    status = step.lstat()  # of a folder its time says too much: what comes and goes in it changes that
    return [status.st_dev, status.st_ino, 0 if stat.S_ISDIR(status.st_mode) else status.st_ctime_ns]


def _name_changed_s(step: Path, is_strict: bool) -> float:
    status = step.lstat()
    if not is_strict and stat.S_ISDIR(status.st_mode) and status.st_mtime_ns == status.st_ctime_ns:
        return 0.0  # something in it came or went last, which a rename does not look like
    return min(status.st_ctime, step.parent.lstat().st_ctime)


def _steps(path: Path) -> Iterator[Path]:
    """Every name on the way, those that its symbolic links lead over too, each with no link before its last part."""
    place, rest, num_links = Path("/"), [*path.absolute().parts[:0:-1]], 0
    while rest:
        name = rest.pop()
        if name == "..":
            place = place.parent
            continue
        step = place / name
        yield step
        if not step.is_symlink():
            place = step
            continue
        num_links += 1
        if num_links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = step.readlink()
        place = Path("/") if target.is_absolute() else place
        rest += [part for part in reversed(target.parts) if part != target.anchor]


def fingerprint_files(files: Iterable[Path]) -> str | None:
    """SHA-256 over names and bytes of those of some files that there are; None when there are none."""
    found = [file for file in files if file.is_file()]
    hasher = hashlib.sha256()
    for file in found:
        name, size = file.name.encode(), file.stat().st_size
        hasher.update(struct.pack("<I", len(name)) + name + struct.pack("<Q", size))
        for piece in _pieces(file):
            hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}" if found else None


def _stamp(file: Path) -> list[object]:
    """As JSON gives it back. The inode's own time tells a rewrite of which the file's time was set back."""
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _files(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not weights:
        raise ConfigError(
            f"{str(folder)!r} holds no *.safetensors files to take a fingerprint of: "
            "set weights_version in kv_connector_extra_config to a name that changes with the weights"
        )
    configs = [folder / name for name in _CONFIGS if (folder / name).is_file()]
    indexes = sorted(folder.glob("*.index.json"))
    others = {file for pattern in _OTHER_WEIGHTS for file in folder.glob(pattern) if file.name not in _HARMLESS_JSON}
    for config in configs:
        named = folder / str(_read(config).get("transformers_weights") or ".")
        others.update([named] if named.is_file() else [])
        indexes += [named] if named.name.endswith(".index.json") and named.is_file() and named not in indexes else []
    others.update(file for index in indexes for file in _named_in(index))
    return configs + weights + indexes + sorted(others - {*configs, *weights, *indexes})


def _named_in(index: Path) -> Iterator[Path]:
    """The files of an index of weights, which may lie in other folders. What is no such index names none."""
    weight_map = _read(index).get("weight_map")
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else ()
    yield from (index.parent / name for name in names if (index.parent / name).is_file())


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; what is none is empty."""
    try:
        content = json.loads(file.read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            yield piece


def _digests(file: Path) -> Iterable[bytes]:
    with file.open("rb") as stream:
        return [hashlib.file_digest(stream, "sha256").digest()]


def _recall(memo: Path, stamp: list[list[object]]) -> str | None:
    try:
        record = json.loads(memo.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    fingerprint = str(record.get("fingerprint", ""))
    is_whole = not fingerprint.startswith("sampled:")  # as an earlier kvferry made them, of parts of large files
    return fingerprint if record.get("files") == stamp and is_whole else None


def _remember(memo: Path, stamp: list[list[object]], fingerprint: str) -> None:
    try:
        memo.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memo.parent)
        with os.fdopen(handle, "w") as stream:
            json.dump({"files": stamp, "fingerprint": fingerprint}, stream)
        os.replace(name, memo)
    except OSError as error:
        logger.warning("the fingerprint is not remembered, so the next start takes it again: %s", error)
