"""The ``crosslmm`` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_crosslmm.errors import UserError


def main(words: Sequence[str] | None = None) -> int:
    """Run one subcommand; a user's mistake is one message on stderr and exit code 2.

    Args:
        words: the command line; None takes the process's own.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(words)
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except BrokenPipeError:  # the reader has gone (`crosslmm ask ... | head`); nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crosslmm",
        description="Pack videos into shards, index and verify shards, compare and ask trained runs.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pack = commands.add_parser("pack", help="write conversations and their videos into shards")
    pack.add_argument("conversations", type=Path, help="a .json or .jsonl file in LLaVA's format or with messages")
    pack.add_argument("video_dir", type=Path, help="the folder its paths start from")
    pack.add_argument("out_dir", type=Path, help="the folder for the shards")
    pack.add_argument("--samples-per-shard", type=int, default=256)
    pack.add_argument("--overwrite", action="store_true", help="replace shards that lie in OUT_DIR")
    pack.add_argument("--skip-bad", action="store_true", help="leave damaged and missing files out, and list them")
    pack.set_defaults(run=_pack)

    index = commands.add_parser("index", help="write indexes for shards that others wrote")
    _add_shards(index)
    index.add_argument("--overwrite", action="store_true", help="write indexes anew that are there")
    index.add_argument("--skip-bad", action="store_true", help="leave damaged samples out, and list them")
    index.set_defaults(run=_index)

    verify = commands.add_parser("verify", help="check shards end to end, and name every damaged member")
    _add_shards(verify)
    verify.add_argument("--decode", action="store_true", help="decode every frame of every clip, too")
    verify.add_argument("--timeout-s", type=float, default=600.0, help="longest time to decode one clip (600)")
    verify.set_defaults(run=_verify)
    _add_run_commands(commands)
    return parser


def _add_run_commands(commands: Any) -> None:
    """Add the commands about runs and configurations; those above are about data."""
    export = commands.add_parser(
        "export", help="write a run's weights as safetensors, with config, provenance and card"
    )
    export.add_argument("run_dir", type=Path, help="a folder that train.py wrote")
    export.add_argument("out_dir", type=Path, help="the folder to make")
    export.add_argument("--checkpoint", metavar="best|last|PATH", help="the best one, or else the last, if not given")
    export.add_argument(
        "--format", choices=("safetensors", "hf"), default="safetensors", help="hf: for transformers, too"
    )
    _add_allow(export)
    export.set_defaults(run=_export)

    report = commands.add_parser("report", help="compare the arms of a sweep: tables, figures, one HTML page")
    report.add_argument("sweep_dir", type=Path, help="a folder with run folders in it, at any depth")
    report.add_argument("--out", dest="out_dir", type=Path, metavar="DIR", help="where to write (SWEEP_DIR/report)")
    report.add_argument(
        "--baseline", metavar="KEY=VALUE", help="the arm to compare with; of several, each arm's own counterpart"
    )
    report.set_defaults(run=_report)

    cost = commands.add_parser("cost", help="count what a configuration costs: operations, memory, least times")
    cost.add_argument("words", nargs="*", metavar="SETTING", help="as for train.py, and gpu=h200, text_tokens=64, ...")
    cost.add_argument("--conf", dest="conf_dir", type=Path, default=Path("conf"), help="where train.yaml lies (./conf)")
    cost.add_argument("--json", dest="as_json", action="store_true", help="JSON in place of a table")
    cost.set_defaults(run=_cost)

    ask = commands.add_parser("ask", help="ask a trained run about a video or an image")
    ask.add_argument("video", type=Path)
    ask.add_argument("questions", nargs="+", metavar="question", help="several are one conversation")
    ask.add_argument("--run", dest="run_dir", type=Path, required=True, help="a folder that train.py wrote")
    _add_allow(ask)
    ask.set_defaults(run=_ask)

    show = commands.add_parser("show", help="draw what a run sees: patches that became tokens, and attention")
    show.add_argument("video", type=Path, help="a video or an image")
    show.add_argument("question", nargs="?", help="shows where text looked before its answer, too")
    show.add_argument("--run", dest="run_dir", type=Path, required=True, help="a folder that train.py wrote")
    show.add_argument("--out", dest="out_dir", type=Path, metavar="DIR", help="where to write (RUN/show/VIDEO)")
    show.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    _add_allow(show)
    show.set_defaults(run=_show)


def _add_allow(command: argparse.ArgumentParser) -> None:
    words = "trust classes of this module in the run's config"
    command.add_argument("--allow", action="append", default=[], metavar="PREFIX", help=words)


def _add_shards(command: argparse.ArgumentParser) -> None:
    command.add_argument("shards", help="a folder, a .tar or a pattern as a/shard-{000000..000003}.tar")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, a shard at a time each")


def _pack(arguments: argparse.Namespace) -> None:
    from lightning_crosslmm.pack import pack  # here, so that --help does not wait for torch

    report = pack(
        arguments.conversations,
        arguments.video_dir,
        arguments.out_dir,
        samples_per_shard=arguments.samples_per_shard,
        overwrite=arguments.overwrite,
        on_bad="skip" if arguments.skip_bad else "error",
    )
    for key, reason in report.skipped:
        sys.stderr.write(f"skipped {key}: {reason}\n")
    mebibytes = report.num_bytes / 2**20
    sys.stdout.write(
        f"{report.num_samples} conversations in {report.num_shards} shards, {mebibytes:.1f} MiB, "
        f"in {arguments.out_dir}\n"
    )


def _index(arguments: argparse.Namespace) -> int:
    from lightning_crosslmm.shard_indexing import index_shards

    report = index_shards(
        arguments.shards, num_workers=arguments.workers, overwrite=arguments.overwrite, skip_bad=arguments.skip_bad
    )
    for reason in report.skipped:
        sys.stderr.write(f"skipped {reason}\n")
    if report.left_out:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(report.left_out.items()))
        sys.stderr.write(f"left out, as they are neither texts nor visuals: {kinds}\n")
    for reason in report.failed:
        sys.stderr.write(f"not indexed: {reason}\n")
    kept = f", {report.num_kept} of them as before" if report.num_kept else ""
    sys.stdout.write(f"{report.num_samples} samples in {report.num_shards} shards with an index{kept}\n")
    return 1 if report.failed else 0


def _verify(arguments: argparse.Namespace) -> int:
    from lightning_crosslmm.shard_verify import Finding, verify_shards

    def say(finding: Finding) -> None:
        sys.stdout.write(f"damaged: {finding.message}\n")
        sys.stdout.flush()

    report = verify_shards(
        arguments.shards,
        say,
        num_workers=arguments.workers,
        decode=arguments.decode,
        timeout_s=arguments.timeout_s,
    )
    if report.num_unlisted:
        sys.stdout.write(f"{report.num_unlisted} samples are in no index: they were left out when it was made\n")
    if report.unindexed:
        first = f"{report.unindexed[0]} first"
        sys.stdout.write(f"{len(report.unindexed)} shards have no index, so no checksum holds their bytes ({first})\n")
    found = f"{report.num_findings} are damaged" if report.num_findings else "nothing is damaged"
    sys.stdout.write(
        f"{report.num_shards} shards, {report.num_samples} samples, {report.num_members} members, "
        f"{report.num_bytes / 2**20:.1f} MiB: {found}\n"
    )
    return 1 if report.num_findings else 0


def _export(arguments: argparse.Namespace) -> None:
    from lightning_crosslmm.export import export_run

    if arguments.allow:
        sys.path.append(os.getcwd())  # a user's own parts, from where he stands
    given = {"form": arguments.format, "allow": tuple(arguments.allow)}
    taken = export_run(arguments.run_dir, arguments.out_dir, arguments.checkpoint, **given)
    num_bytes = sum(path.stat().st_size for path in arguments.out_dir.glob("*.safetensors"))
    sys.stdout.write(f"{taken} as {num_bytes / 2**20:.1f} MiB of safetensors in {arguments.out_dir}\n")


def _report(arguments: argparse.Namespace) -> None:
    from lightning_crosslmm.report import write_report

    paths = write_report(arguments.sweep_dir, arguments.out_dir, arguments.baseline)
    sys.stdout.write("".join(f"{path}\n" for path in paths))


def _cost(arguments: argparse.Namespace) -> None:
    from lightning_crosslmm.cost import cost

    sys.path.append(os.getcwd())  # a user's own parts, from where he stands
    sys.stdout.write(cost(arguments.words, arguments.conf_dir, arguments.as_json) + "\n")


def _ask(arguments: argparse.Namespace) -> None:
    from lightning_crosslmm.answer import Answerer

    if arguments.allow:
        sys.path.append(os.getcwd())  # a user's own parts, from where he stands
    answerer = Answerer.from_run(arguments.run_dir, tuple(arguments.allow))

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    answerer.ask(arguments.video, arguments.questions, say)


def _show(arguments: argparse.Namespace) -> None:
    from lightning_crosslmm.show import show

    if arguments.allow:
        sys.path.append(os.getcwd())  # a user's own parts, from where he stands
    given = {"overwrite": arguments.overwrite, "allow": tuple(arguments.allow)}
    paths = show(arguments.video, arguments.run_dir, arguments.question, arguments.out_dir, **given)
    sys.stdout.write("".join(f"{path}\n" for path in paths))


if __name__ == "__main__":
    sys.exit(main())
