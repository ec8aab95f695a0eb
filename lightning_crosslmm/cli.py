"""The ``crosslmm`` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

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
        arguments.run(arguments)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except BrokenPipeError:  # the reader has gone (`crosslmm ask ... | head`); nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crosslmm", description="Pack videos into shards, and ask trained runs about videos."
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

    ask = commands.add_parser("ask", help="ask a trained run about a video or an image")
    ask.add_argument("video", type=Path)
    ask.add_argument("questions", nargs="+", metavar="question", help="several are one conversation")
    ask.add_argument("--run", dest="run_dir", type=Path, required=True, help="a folder that train.py wrote")
    ask.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PREFIX",
        help="trust classes of this module in the run's config",
    )
    ask.set_defaults(run=_ask)
    return parser


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


def _ask(arguments: argparse.Namespace) -> None:
    from lightning_crosslmm.answer import Answerer

    if arguments.allow:
        sys.path.append(os.getcwd())  # a user's own parts, from where he stands
    answerer = Answerer.from_run(arguments.run_dir, tuple(arguments.allow))

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    answerer.ask(arguments.video, arguments.questions, say)


if __name__ == "__main__":
    sys.exit(main())
