"""`jvgen data`: build data sets, show and count what they have, score, verify and upgrade them."""

import argparse

from jvgen.cli import build, build_cached, build_published
from jvgen.cli.arguments import add_command, check_output, number, path
from jvgen.value_rules import Count, Fraction, Workers

SCORES = ("motion", "sharpness", "duplicates")  # `jvgen.data.builders.scores.SCORES`, without importing it


def add_commands(commands) -> None:
    """Add `data build`, `merge`, `append`, `show`, `stats`, `score`, `verify` and `upgrade`."""
    parser = add_command(commands, "data", "build data sets and show what they hold", "jvgen data show data/scenes")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    origins = add_command(
        actions, "build", "build a data set in ArrayRecord files", "jvgen data build scenes --out data/scenes"
    ).add_subparsers(dest="origin", required=True, metavar="ORIGIN")
    build.add_builders(origins)
    build_cached.add_builders(origins)
    build_published.add_builders(origins)
    merge = add_command(
        actions, "merge", "make one data set of the parts that `jvgen data build --part` made",
        "jvgen data merge data/videos.part-* --out data/videos",
        details="The files are those of a build without parts. The parts are removed when the data set is there. Both "
        "may be in buckets: 'gs://BUCKET/videos.part-*' is expanded.",
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
    _add_stats(actions)
    _add_score(actions)
    verify = add_command(
        actions, "verify", "read a whole data set and compare it with its checksums",
        "jvgen data verify data/videos --threads 16", handler=run_verify,
    )  # fmt: skip
    verify.add_argument("path", metavar="DIR", help="data set folder")
    verify.add_argument(
        "--threads", type=number(Workers), default=4, metavar="N", help="shards that are read at a time"
    )
    upgrade = add_command(
        actions, "upgrade", "write the index of a data set of jvgen 0.1.0 in the present format",
        "jvgen data upgrade data/videos", handler=run_upgrade,
        details="The digests stay the same, so runs resume; ten million records then open at once.",
    )  # fmt: skip
    upgrade.add_argument("path", metavar="DIR", help="data set folder, on a local disk")


def _add_stats(actions) -> None:
    stats = add_command(
        actions, "stats", "print distributions of the columns of a data set and draw them in one picture",
        "jvgen data stats data/videos --out stats.png", handler=run_stats,
    )  # fmt: skip
    stats.add_argument("path", metavar="DIR", help="data set folder")
    stats.add_argument("--split", default="train", metavar="NAME", help="split to count")
    stats.add_argument(
        "--where",
        metavar="FILTER",
        help="only records that a filter takes, such as \"aesthetic > 5 and license == 'cc0'\"",
    )
    stats.add_argument(
        "--config", metavar="CONFIG", type=path, help="config file: also count records and tokens of its buckets"
    )
    stats.add_argument("--out", type=path, metavar="FILE", help="PNG file for the picture; none if omitted")


def _add_score(actions) -> None:
    score = add_command(
        actions, "score", "compute motion, sharpness and near-duplicates as columns of a data set",
        "jvgen data score data/videos --workers 16", handler=run_score,
        details="A call that is killed goes on where it was. Use them in filters: "
        "data.sources.0.where=\"motion > 0.05 and sharpness > 50 and duplicate_of is None\".",
    )  # fmt: skip
    score.add_argument("path", metavar="DIR", help="data set folder, on a local disk")
    score.add_argument("--split", default="train", metavar="NAME", help="split to score")
    score.add_argument(
        "--scores", nargs="+", choices=SCORES, default=SCORES, metavar="NAME", help=f"some of {', '.join(SCORES)}"
    )
    score.add_argument("--workers", type=number(Workers), default=1, metavar="N", help="processes that decode")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--error-budget", type=number(Fraction), metavar="X",
        help="fraction of all files that may be corrupt; as in the build if omitted",
    )  # fmt: skip


def run_merge(parsed: argparse.Namespace) -> int:
    """Merge parts."""
    from jvgen.data.builders.assembly import merge_parts

    print(
        merge_parts(_expanded(parsed.parts), parsed.out, error_budget=parsed.error_budget, overwrite=parsed.overwrite)
    )
    build_cached.report_latents(parsed.out)
    return 0


def _expanded(parts: list[str]) -> list:
    """Patterns of folders in buckets, which shells do not expand, as the folders."""
    from jvgen.storage import as_path, is_remote

    found: list = []
    for part in parts:
        if is_remote(part) and "*" in part:
            path = as_path(part)
            matching = sorted(path.parent.glob(path.name))
            if not matching:
                raise ValueError(f"{part}: no folder in the bucket matches.")
            found += matching
        else:
            found.append(part)
    return found


def run_append(parsed: argparse.Namespace) -> int:
    """Append parts."""
    from jvgen.data.builders.assembly import append_parts

    print(append_parts(parsed.path, _expanded(parsed.parts), error_budget=parsed.error_budget))
    build_cached.report_latents(parsed.path)
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


def run_stats(parsed: argparse.Namespace) -> int:
    """Print the table and write the picture."""
    from rich.console import Console

    from jvgen.runs.data_statistics import data_statistics
    from jvgen.storage import write_bytes
    from jvgen.training.experiment import load_experiment

    experiment = None if parsed.config is None else load_experiment(parsed.config, [])
    if parsed.out is not None:
        check_output("--out", parsed.out)
    statistics = data_statistics(parsed.path, parsed.split, parsed.where, experiment)
    statistics.print(Console())
    if parsed.out is not None:
        write_bytes(parsed.out, statistics.picture())
        print(f"wrote {parsed.out}")
    return 0


def run_score(parsed: argparse.Namespace) -> int:
    """Write the columns and say what they are."""
    from jvgen.data.builders.scores import score
    from jvgen.terminal import progress_bar

    with progress_bar("scoring", "records") as report:
        scored = score(parsed.path, parsed.split, parsed.scores, parsed.workers, report)
    print(f"{parsed.path} [{parsed.split}]: {scored.records} records have columns {', '.join(scored.columns)}")
    if scored.duplicates:
        print(f"{scored.duplicates} are near-duplicates of an earlier one")
    if scored.unreadable:
        print(f"{len(scored.unreadable)} cannot be decoded and have none: {', '.join(scored.unreadable[:10])}")
    return 0


def run_verify(parsed: argparse.Namespace) -> int:
    """Name damaged records; fails if there are any."""
    from jvgen.data.store.sources import splits
    from jvgen.data.store.verify import verify
    from jvgen.terminal import progress_bar

    damaged = 0
    for split, count in splits(parsed.path).items():
        with progress_bar(f"verifying {split}", "records") as report:
            damages = verify(parsed.path, split, parsed.threads, report)
        for damage in damages:
            print(f"{split} row {damage.row}, {damage.id}: {damage.reason}")
        print(f"{split}: {count - len(damages)} of {count} records are what was written")
        damaged += len(damages)
    return 1 if damaged else 0


def run_upgrade(parsed: argparse.Namespace) -> int:
    """Write the indices and print their digests."""
    from jvgen.data.store.publish import upgrade
    from jvgen.data.store.sources import find_dataset

    for split, index in upgrade(find_dataset(parsed.path)).items():
        print(f"{split}: {len(index)} records, digest {index.digest[:12]}")
    return 0
