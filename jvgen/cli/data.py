"""`jvgen data`: build data sets and show what they hold."""

import argparse

from jvgen.cli import build, build_published
from jvgen.cli.arguments import add_command, number, path
from jvgen.value_rules import Count, Fraction


def add_commands(commands) -> None:
    """Add `data build`, `data merge`, `data append` and `data show`."""
    parser = add_command(commands, "data", "build data sets and show what they hold", "jvgen data show data/scenes")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    origins = add_command(
        actions, "build", "build a data set in ArrayRecord files", "jvgen data build scenes --out data/scenes"
    ).add_subparsers(dest="origin", required=True, metavar="ORIGIN")
    build.add_builders(origins)
    build_published.add_builders(origins)
    merge = add_command(
        actions, "merge", "make one data set of the parts that `jvgen data build --part` made",
        "jvgen data merge data/videos.part-* --out data/videos",
        details="The files are those of a build without parts. The parts are removed when the data set is there.",
        handler=run_merge,
    )  # fmt: skip
    merge.add_argument("parts", nargs="+", metavar="PART", help="folder of a part")
    merge.add_argument("--out", required=True, metavar="DIR", help="folder of the new data set")
    merge.add_argument("--overwrite", action="store_true", help="replace a data set that exists in that folder")
    _add_budget(merge)
    append = add_command(
        actions, "append", "add parts that `jvgen data build --part` made to a data set",
        "jvgen data append data/videos data/more.part-*",
        details="To add new files of a folder on one machine: `jvgen data build ... --append`. Runs on the data set go "
        "on, but do not resume from checkpoints of before: the data set has other records.",
        handler=run_append,
    )  # fmt: skip
    append.add_argument("path", metavar="DIR", help="data set folder")
    append.add_argument("parts", nargs="+", metavar="PART", help="folder of a part; all parts of a build are needed")
    _add_budget(append)
    show = add_command(
        actions, "show", "print a table of a data set; optionally write a contact sheet and an animation",
        "jvgen data show data/scenes --out pictures",
        handler=run_show,
    )  # fmt: skip
    show.add_argument("path", metavar="DIR", help="data set folder")
    show.add_argument("--split", default="train", metavar="NAME", help="split to show")
    show.add_argument("--count", type=number(Count), default=8, metavar="N", help="number of records to show")
    show.add_argument("--out", type=path, metavar="DIR", help="folder for sheet.png and clips.gif; none if omitted")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--error-budget", type=number(Fraction), metavar="X",
        help="fraction of all files that may be corrupt; as in the build if omitted",
    )  # fmt: skip


def run_merge(parsed: argparse.Namespace) -> int:
    """Merge parts."""
    from jvgen.data.builders.build_loop import merge_parts

    print(merge_parts(parsed.parts, parsed.out, error_budget=parsed.error_budget, overwrite=parsed.overwrite))
    return 0


def run_append(parsed: argparse.Namespace) -> int:
    """Append parts."""
    from jvgen.data.builders.build_loop import append_parts

    print(append_parts(parsed.path, parsed.parts, error_budget=parsed.error_budget))
    return 0


def run_show(parsed: argparse.Namespace) -> int:
    """Print the table and write the pictures."""
    from jvgen.data.store.show import show

    shown = show(parsed.path, parsed.split, parsed.count)
    print(shown.text, end="")
    if parsed.out is not None:
        parsed.out.mkdir(parents=True, exist_ok=True)
        (parsed.out / "sheet.png").write_bytes(shown.sheet)
        (parsed.out / "clips.gif").write_bytes(shown.animation)
        print(f"wrote {parsed.out / 'sheet.png'} and {parsed.out / 'clips.gif'}")
    return 0
