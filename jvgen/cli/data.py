"""`jvgen data`: build data sets and show what they hold."""

import argparse

from jvgen.cli import build, build_published
from jvgen.cli.arguments import add_command, number, path
from jvgen.value_rules import Count


def add_commands(commands) -> None:
    """Add `data build` and `data show`."""
    parser = add_command(commands, "data", "build data sets and show what they hold", "jvgen data show data/scenes")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    origins = add_command(
        actions, "build", "build a data set in ArrayRecord files", "jvgen data build scenes --out data/scenes"
    ).add_subparsers(dest="origin", required=True, metavar="ORIGIN")
    build.add_builders(origins)
    build_published.add_builders(origins)
    show = add_command(
        actions, "show", "print a table of a data set; optionally write a contact sheet and an animation",
        "jvgen data show data/scenes --out pictures",
        handler=run_show,
    )  # fmt: skip
    show.add_argument("path", metavar="DIR", help="data set folder")
    show.add_argument("--split", default="train", metavar="NAME", help="split to show")
    show.add_argument("--count", type=number(Count), default=8, metavar="N", help="number of records to show")
    show.add_argument("--out", type=path, metavar="DIR", help="folder for sheet.png and clips.gif; none if omitted")


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
