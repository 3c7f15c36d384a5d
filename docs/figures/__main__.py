"""Writes every figure beside this file: python -m docs.figures"""

from pathlib import Path

from docs.figures.drawings import DRAWINGS, files

HERE = Path(__file__).parent


def main() -> None:
    """Draws the SVG files, then the picture over frames of a rendered scene."""
    from docs.figures import epipolar

    for name, text in files().items():
        (HERE / name).write_text(text)
    (HERE / "epipolar_band.png").write_bytes(epipolar.picture())
    print(f"{len(DRAWINGS)} drawings for light and dark pages, and epipolar_band.png, in {HERE}")


if __name__ == "__main__":
    main()
