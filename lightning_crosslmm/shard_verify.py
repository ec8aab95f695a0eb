"""Shards checked end to end: headers, checksums, indexes, manifest, and on request every frame of every clip."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from lightning_crosslmm.conversation_members import TEXTS, conversation_of, visual_kind
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_build import Report, Sample, hash_bytes, list_samples, read_texts
from lightning_crosslmm.shard_files import MANIFEST, UNFINISHED, ShardRecord, read_manifest
from lightning_crosslmm.shard_index import ShardIndex, index_path
from lightning_crosslmm.shard_set import local_tars
from lightning_crosslmm.shard_tar import Window
from lightning_crosslmm.video_probe import check_visual
from lightning_crosslmm.workers import Worker, WorkerLostError, work_through


class Finding(NamedTuple):
    """Something damaged: the shard or folder, the sample's key or "", and a message that names both."""

    where: Path
    key: str
    message: str


class VisualPlace(NamedTuple):
    """A visual whose bytes are those of the index, and where they lie."""

    key: str
    member: str
    offset: int
    size: int


@dataclass
class ShardReport:
    """What checking one shard found; ``num_unlisted`` samples are not in its index."""

    findings: list[Finding] = field(default_factory=list)
    visuals: list[VisualPlace] = field(default_factory=list)
    num_samples: int = 0
    num_members: int = 0
    num_bytes: int = 0
    num_unlisted: int = 0
    has_index: bool = False


@dataclass
class VerifyReport:
    """What checking all shards found; ``unindexed`` are those with no checksums to hold them against."""

    num_shards: int = 0
    num_samples: int = 0
    num_members: int = 0
    num_bytes: int = 0
    num_unlisted: int = 0
    num_findings: int = 0
    unindexed: list[Path] = field(default_factory=list)


def verify_shards(
    spec: str | Path,
    say: Callable[[Finding], None],
    *,
    num_workers: int = 1,
    decode: bool = False,
    timeout_s: float = 600.0,
) -> VerifyReport:
    """Check shards end to end, to their last member whatever is found before.

    Of each shard: its chain of headers and end marks; that the members are those of its index, with their sha256, or,
    where it has no index, that every text is understood and has its visuals; that index and manifest agree.

    Args:
        spec: a folder, a tar or a brace pattern of tars, on this machine.
        say: is told of each finding, shard by shard in order.
        num_workers: processes, a shard at a time each.
        decode: decode all frames of all visuals whose bytes are right.
        timeout_s: longest time to decode one visual, in seconds.

    Raises:
        UserError: names spec or setting where nothing can be checked.
    """
    if timeout_s <= 0:
        raise UserError(f"timeout_s must be above 0, got {timeout_s:g}")
    paths = local_tars(spec)
    total = VerifyReport()
    records = dict[Path, ShardRecord]()
    for folder in dict.fromkeys(path.parent for path in paths):
        asked = None if Path(spec).is_dir() else {path.name for path in paths if path.parent == folder}
        for finding in _check_folder(folder, asked, records):
            total.num_findings += 1
            say(finding)

    def job(worker: Worker, path: Path) -> ShardReport:
        try:
            report = worker.call(check_shard, path, records.get(path))
        except WorkerLostError as error:
            return ShardReport([Finding(path, "", f"{path}: reading it {error}")])
        if decode:
            report.findings += _decode(worker, path, report.visuals, timeout_s)
        return report

    for path, report in zip(paths, work_through(job, paths, num_workers, (__name__,)), strict=True):
        for finding in report.findings:
            say(finding)
        total.num_shards += 1
        total.num_findings += len(report.findings)
        total.num_samples += report.num_samples
        total.num_members += report.num_members
        total.num_bytes += report.num_bytes
        total.num_unlisted += report.num_unlisted
        total.unindexed += [] if report.has_index else [path]
    return total


def _check_folder(folder: Path, asked: set[str] | None, records: dict[Path, ShardRecord]) -> Iterator[Finding]:
    """Hold a folder, or those of its shards that are asked for, against its manifest, and note what that says."""
    if (folder / UNFINISHED).exists():
        yield Finding(folder, "", f"{folder}: its writing did not finish ({UNFINISHED} is there)")
    try:
        known = read_manifest(folder)[0]
    except UserError as error:
        yield Finding(folder, "", str(error))
        return
    records.update({folder / name: record for name, record in known.items()})
    there = {path.name for path in folder.glob("*.tar")} if asked is None else asked
    for name in sorted(set(known) - there) if asked is None else ():
        yield Finding(folder / name, "", f"{folder / name}: is not there, but {MANIFEST} names it")
    for name in sorted(there - set(known)) if known else ():
        yield Finding(folder / name, "", f"{folder / name}: is not in {MANIFEST}; `crosslmm index` adds it")


def check_shard(path: Path, record: ShardRecord | None = None) -> ShardReport:
    """Check one shard.

    Args:
        path: the tar.
        record: what the folder's manifest says of it, if there is one.
    """
    found = ShardReport()

    def report(key: str, message: str) -> None:
        found.findings.append(Finding(path, key, message))

    try:
        with open(path, "rb") as file:
            found.num_bytes = file.seek(0, 2)
            index = _check_index(path, found.num_bytes, record, report)
            samples, _ = list_samples(file, path, report)
            found.has_index = index_path(path).exists()
            found.num_samples, found.num_members = len(samples), sum(map(len, samples.values()))
            if index is None:
                found.visuals = _check_texts(file, path, samples, report)
            else:
                found.visuals = _check_members(file, path, samples, index, report)
                found.num_unlisted = len(set(samples) - {entry.key for entry in index.entries})
    except OSError as error:
        report("", f"{path}: cannot be read ({error.strerror})")
    return found


def _check_index(path: Path, num_bytes: int, record: ShardRecord | None, report: Report) -> ShardIndex | None:
    beside = index_path(path)
    try:
        index = ShardIndex.from_json(beside.read_bytes(), str(beside))
    except FileNotFoundError:
        if record is not None:
            report("", f"{beside}: is not there, but {MANIFEST} names it")
        return None
    except UserError as error:
        report("", str(error))
        return None
    if index.shard != path.name:
        report("", f"{path}: its index was made of '{index.shard}'")
    if index.num_bytes != num_bytes:
        what = f"has {num_bytes} bytes, but its index was made of {index.num_bytes}"
        report("", f"{path}: {what}: it was cut off or written later")
    if record is not None and record != ShardRecord.of(index):
        report("", f"{beside}: is not the index that {MANIFEST} names ({record.index_sha256[:12]}...)")
    return index


def _check_texts(file: BinaryIO, path: Path, samples: Mapping[str, Sample], report: Report) -> list[VisualPlace]:
    visuals = []
    for key, sample in samples.items():
        try:
            conversation_of(key, read_texts(file, sample), str(path))
        except UserError as error:
            report(key, str(error))
        visuals += [VisualPlace(key, m, *sample[m][1:3]) for m in sample if m not in TEXTS]
    return visuals


def _check_members(
    file: BinaryIO, path: Path, samples: Mapping[str, Sample], index: ShardIndex, report: Report
) -> list[VisualPlace]:
    visuals = []
    num_bytes = file.seek(0, 2)
    for entry in index.entries:
        sample = samples.get(entry.key, {})
        for extra in set(sample) - set(entry.members):
            report(entry.key, f"{path}: sample '{entry.key}', member '{extra}': is not in the index")
        for name, member in entry.members.items():
            where = f"{path}: sample '{entry.key}', member '{name}'"
            header = sample.get(name)
            if member.offset + member.size > num_bytes:
                report(entry.key, f"{where}: is cut off, the tar ends at byte {num_bytes}")
            elif header is not None and (header.offset, header.size) != (member.offset, member.size):
                told = f"byte {member.offset} with {member.size} bytes"
                report(entry.key, f"{where}: lies at byte {header.offset} with {header.size}, the index says {told}")
            elif hash_bytes(file, member.offset, member.size) != member.sha256:
                report(entry.key, f"{where}: its {member.size} bytes do not have the sha256 of the index")
            elif header is None:
                report(entry.key, f"{where}: its bytes are right, but its header is damaged")
            elif name not in TEXTS:
                visuals.append(VisualPlace(entry.key, name, member.offset, member.size))
    return visuals


def _decode(worker: Worker, path: Path, visuals: list[VisualPlace], timeout_s: float) -> Iterator[Finding]:
    for visual in visuals:
        where = f"{path}: sample '{visual.key}', member '{visual.member}'"
        try:
            worker.call(_decode_one, path, visual, where, timeout_s=timeout_s)
        except UserError as error:
            yield Finding(path, visual.key, str(error))
        except WorkerLostError as error:
            yield Finding(path, visual.key, f"{where}: decoding it {error}")


def _decode_one(path: Path, visual: VisualPlace, where: str) -> None:
    with open(path, "rb") as file:
        window = cast(BinaryIO, Window(file, visual.offset, visual.size))
        check_visual(window, where, visual_kind(visual.member))
