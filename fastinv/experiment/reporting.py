"""What reports have in common: tables, figures and pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastinv.experiment import results
from fastinv.experiment.cells import Cell
from fastinv.experiment.results import Result
from fastinv.picture import Row, picture
from fastinv.pixels import as_pixels
from fastinv.places import new_file

SHOWN = "experiments"  # in a picture's metadata: of what it is
HOW_CHOSEN = (
    "λ, β and the number of steps were chosen on {} of the attacker's training images, from features such as he will "
    "see: the edge's, or for a query-free attack those of a second shadow."
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    escaped = ([" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in rows)
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *escaped)]


def figures(result: Result) -> str:
    """Mean PSNR in dB / mean SSIM, share of images that can be recognised."""
    return f"{result.psnr:.2f} / {result.ssim:.3f}, {result.recognisable:.0%}"


def recipe_table(recipes: Mapping[Cell, Result]) -> list[str]:
    """How rMLE was set, and what it gave on the images that this was chosen on."""
    rows = []
    for cell, result in recipes.items():
        recipe = result.recipe
        steps = f"{recipe['steps']:,}" + (f" of size {recipe['lr']:g}" if "lr" in recipe else "")
        chosen = [f"{recipe['tv_weight']:g}", f"{recipe['tv_beta']:g}", steps, f"{recipe['psnr']:.2f} dB"]
        rows.append([cell.split, cell.attack.title, *chosen])
    return markdown(["split point", "attack", "λ", "β", "steps", "PSNR there"], rows)


def draw(file: Path, folder: Path, rows: Sequence[tuple[Cell, str]]) -> None:
    """Draw the first images that experiments recovered, each under its title, below the true ones; where that was done
    since the last of them ran, the picture stays.

    Raises:
        FormatError: what is to be drawn cannot be read, or the picture not be written.
    """
    shown = "\n".join(f"{cell.name} {title}" for cell, title in rows)
    sources = [folder / results.TRUTH, *(folder / f"{cell.name}.npz" for cell, _ in rows)]
    if _shows(file, shown) and all(s.exists() and s.stat().st_mtime_ns < file.stat().st_mtime_ns for s in sources):
        return
    drawn = [Row("truth", as_pixels(results.read_truth(folder), "uint8"))]
    for cell, title in rows:
        images, scores = results.read_images(folder, cell)
        drawn.append(Row(title, as_pixels(images, "uint8"), scores.captions()))
    image = picture(drawn)
    about = PngInfo()
    about.add_itxt(SHOWN, shown)
    with results.telling(file), new_file(file) as opened:
        image.save(opened, "PNG", pnginfo=about)


def _shows(file: Path, shown: str) -> bool:
    """Whether a picture is there, of these experiments under these titles."""
    try:
        with Image.open(file) as image:
            found: bool = getattr(image, "text", {}).get(SHOWN) == shown
            return found
    except OSError:
        return False


def write_text(file: Path, text: str) -> None:
    """Write a file of text.

    Raises:
        FormatError: it cannot be written.
    """
    with results.telling(file), new_file(file) as opened:
        opened.write(text.encode())
