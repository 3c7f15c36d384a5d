"""What a source leaves out of every bucket: by its filter, by licenses that the run may use, by a list of names."""

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from jvgen.data.store.index import Index
from jvgen.data.store.strings import Text
from jvgen.data.stream import where
from jvgen.data.stream.config import SourceConfig
from jvgen.data.stream.exclusions import excluded_rows

# Tables have the column in either spelling.
_LICENSE = re.compile("licen[sc]e")


@dataclasses.dataclass(frozen=True)
class SourceFilter:
    """Rows that a source leaves out.

    Attributes:
      rejected: (reason, bool per row), in the order in which rows are counted.
      rows_digest: changes with the rows that `where` and `licenses` leave out; None without them. The filter itself is
        not in it: values in a table may change, and a filter may be written in another way.
    """

    rejected: tuple[tuple[str, np.ndarray], ...]
    rows_digest: str | None


def source_filter(source: SourceConfig, index: Index, licenses: Sequence[str]) -> SourceFilter:
    """The filter of a source.

    Raises:
      ValueError: names the source, and what to change: an unknown column, no column of licenses, nothing that is left.
    """
    named = f"{source.path} [{source.split}]"
    rejected: list[tuple[str, np.ndarray]] = []
    if source.exclude is not None:
        listed = excluded_rows(source.exclude, index)
        if not listed.any():
            raise ValueError(
                f"{named}: exclude = {source.exclude!r} names none of its {len(index)} records "
                f"(the first is {index.id[0] if len(index) else 'none'!r}). Build the data set again, so that ids "
                "have the names of recordings, or set exclude = none if it has none of these recordings."
            )
        rejected.append((f"left out by exclude = {source.exclude!r}", listed))
    by_content = []
    if source.where is not None:
        try:
            fits = where.rows_that_fit(source.where, index)
        except where.FilterError as error:
            raise ValueError(f"{named}: where = {source.where!r}: {error}") from None
        if not fits.any():
            raise ValueError(
                f"{named}: where = {source.where!r} leaves none of its {len(index)} records. They have "
                f"{where.summary(source.where, index)}. Change the filter, or remove the source."
            )
        by_content.append((f"left out by where = {source.where!r}", ~fits))
    if licenses:
        allowed = np.isin(license_codes(named, index, licenses), np.arange(len(licenses)))
        if not allowed.any():
            counts = list(_licenses(named, index).counts().items())[:8]
            raise ValueError(
                f"{named}: data.licenses = {tuple(licenses)} leaves none of its {len(index)} records. They have "
                f"{', '.join(f'{name!r} ({count})' for name, count in counts)}. Change data.licenses, or remove the "
                "source."
            )
        by_content.append(("with a license that data.licenses does not allow", ~allowed))
    digest = None
    if by_content:
        left = np.logical_or.reduce([mask for _, mask in by_content])
        digest = hashlib.sha256(np.packbits(left).tobytes()).hexdigest()
    return SourceFilter((*rejected, *by_content), digest)


def license_counts(
    sources: Sequence[SourceConfig],
    indices: Sequence[Index],
    filters: Sequence[SourceFilter],
    licenses: Sequence[str],
) -> dict[str, int]:
    """Records of each license of a run, of those that the filters of the sources take."""
    total = np.zeros(len(licenses), np.int64)
    for source, index, chosen in zip(sources, indices, filters, strict=True):
        codes = license_codes(f"{source.path} [{source.split}]", index, licenses)
        taken = ~np.logical_or.reduce([mask for _, mask in chosen.rejected])
        total += np.bincount(codes[taken], minlength=len(licenses))
    return dict(zip(licenses, total.tolist(), strict=True))


def license_codes(named: str, index: Index, licenses: Sequence[str]) -> np.ndarray:
    """For every row the number of its license in `licenses`, -1 for others, int32."""
    column = _licenses(named, index)
    table = np.full(len(column.values), -1, np.int32)
    for number, license in enumerate(licenses):
        code = column.code(license)
        if code >= 0:
            table[code] = number
    return table[column.codes]


def _licenses(named: str, index: Index) -> Text:
    for name, column in index.columns.items():
        if _LICENSE.fullmatch(name) and isinstance(column, Text):
            return column
    near = difflib.get_close_matches("license", list(index.columns), n=1, cutoff=0.5)
    hint = f" Is it {near[0]}?" if near else ""
    raise ValueError(
        f"{named}: data.licenses needs a text column license; its columns are {', '.join(index.columns) or 'none'}."
        f"{hint} Build the data set with a table that has one, or set data.licenses = ()."
    )
