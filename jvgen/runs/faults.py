"""Clips that are not finite: collected while the others are written, and told in one error."""

from collections.abc import Iterator, Sequence

from jvgen.finite import Finite, NotFinite, advice

MAX_LISTED = 20


class Faults:
    """Clips of a call that hold NaN or infinity.

    Args:
      dtype: what the networks compute in.
      option: of the command for another dtype, if there is one.
    """

    def __init__(self, dtype: str, option: str | None = None):
        self._dtype, self._option = dtype, option
        self._lines: list[str] = []
        self._finite = 0
        self._any_in_batch = False

    def finite_rows(self, names: Sequence[str], finite: Finite) -> Iterator[int]:
        """The rows of a batch that are finite; the others are noted.

        Args:
          names: of the clips, for messages; rows after them only fill the batch up.
          finite: of the batch, in host memory.
        """
        self._any_in_batch = False
        for row, name in enumerate(names):
            fault = finite.fault(row)
            if fault is None:
                self._any_in_batch, self._finite = True, self._finite + 1
                yield row
            else:
                what, network = fault
                self._lines.append(f"{name}: {what}, from the {network} in {self._dtype}")

    def stop_without_a_finite_clip(self) -> None:
        """Raise `NotFinite` if the last batch had no finite clip: the next one would hardly have one either."""
        if not self._any_in_batch:
            self._raise(" The call ended with this batch.")

    def raise_if_any(self) -> None:
        """Raise `NotFinite` if any clip was not finite."""
        if self._lines:
            self._raise()

    def _raise(self, ending: str = "") -> None:
        more = [f"and {len(self._lines) - MAX_LISTED} more"] if len(self._lines) > MAX_LISTED else []
        listed = "".join(f"\n  {line}" for line in [*self._lines[:MAX_LISTED], *more])
        raise NotFinite(
            f"{len(self._lines)} of {len(self._lines) + self._finite} clips hold NaN or infinity and were not written; "
            f"the same call makes them again.{ending}{listed}\n{advice(self._dtype, self._option)}"
        )
