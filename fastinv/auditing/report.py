"""The report of an audit: what each attack recovers, by split point, as text, as data and as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fastinv.auditing.points import Point
from fastinv.experiment import results
from fastinv.experiment.cells import Cell, file_name
from fastinv.experiment.reporting import HOW_CHOSEN, draw, figures, markdown, recipe_table, write_text
from fastinv.experiment.results import Result
from fastinv.experiment.scores import RECOGNISABLE, Scores
from fastinv.places import make_folder

REPORT, RECORDS, OVERVIEW = "report.md", "results.json", "overview.png"
PICTURES = "pictures"  # the folder beside them with one for each split point
FOLDER = "attacks"  # the folder beside them with what each attack gave
REPORTS = (REPORT, RECORDS, OVERVIEW, PICTURES)  # all that is not in the latter
Found = Mapping[Cell, Result]
T = TypeVar("T")


def write_report(
    out: Path,
    model: str,
    points: Mapping[str, Point],
    found: Found,
    nothing: Scores,
    failed: Mapping[Cell, str],
) -> None:
    """Write `report.md`, `results.json` and pictures into the folder `out`.

    Args:
        points: what is told of each split point of `found`.
        found: results, in the order of the model's forward.
        nothing: scores of what needs no features.
        failed: why others have none, of those that were to run now.

    Raises:
        FormatError: a picture cannot be drawn from what is kept, or the report not be written.
    """
    lines = [*_head(out, model, nothing), *_summary(points, found), *_all_attacks(found)]
    recipes = {cell: result for cell, result in found.items() if result.recipe}
    if recipes:
        chosen_on = next(iter(recipes.values())).chosen_on
        lines += ["## How rMLE was set", HOW_CHOSEN.format(chosen_on), "", *recipe_table(recipes), ""]
    if failed:
        rows = [[cell.split, cell.attack.title, reason] for cell, reason in failed.items()]
        lines += ["## What failed now", *markdown(["cut after", "attack", "why"], rows), ""]
    lines += _pictures(out, found)
    write_text(out / REPORT, "\n".join(lines))
    records = [_record(points[cell.split], result) for cell, result in found.items()]
    write_text(out / RECORDS, json.dumps(records, indent=1) + "\n")


def strongest(found: Mapping[tuple[str, T], Result]) -> dict[str, T]:
    """Of results by split point and attack, by split point the attack of the highest mean SSIM."""
    best: dict[str, T] = {}
    for (at, attack), result in found.items():
        if at not in best or result.ssim > found[at, best[at]].ssim:
            best[at] = attack
    return best


def _strongest(found: Found) -> dict[str, Cell]:
    """By split point the experiment of the highest mean SSIM."""
    attacks = strongest({(cell.split, cell.attack): result for cell, result in found.items()})
    return {at: Cell(at, attack) for at, attack in attacks.items()}


def _head(out: Path, model: str, nothing: Scores) -> list[str]:
    settings = results.read_settings(out / FOLDER)
    psnr, ssim = nothing.means
    protection = f"Features are protected before they are sent, by {settings['protect']}."
    return [
        f"# What {model} gives away, by where it is cut",
        f"An entry is the mean PSNR in dB and the mean SSIM of {len(nothing.psnr):,} recovered images, and the share "
        f"of them that can be recognised (an SSIM of {RECOGNISABLE} or more). That much leaks at least: a better "
        "attack may recover more.",
        "",
        *([protection, ""] if settings.get("protect") else []),
        f"Without any features, the mean of the attacker's images gives {psnr:.2f} / {ssim:.3f}, "
        f"{nothing.recognisable:.0%}: what is no better tells him nothing.",
        "",
        f"Inverse networks (kind {settings['kind']}) learned for {settings['epochs']} epochs, shadows for "
        f"{settings['shadow_epochs']}, in {settings['precision']}, seed {settings['seed']}; rMLE went by "
        f"{settings['optimizer']}.",
        "",
    ]


def _summary(points: Mapping[str, Point], found: Found) -> list[str]:
    rows = []
    for at, cell in _strongest(found).items():
        point, result = points[at], found[cell]
        shape = " × ".join(map(str, point.feature_shape))
        size = f"{point.kibibytes:,.1f}"
        work = "" if point.flops is None else f"{point.flops / 1e6:,.2f}"
        right = "" if point.accuracy is None else f"{point.accuracy:.1%}"
        at += " (+)" if point.crossing else ""
        rows.append([at, shape, size, work, right, cell.attack.title, figures(result)])
    header = [
        "cut after",
        "features",
        "KiB in float32",
        "MFLOP of the edge",
        "right classes",
        "strongest attack",
        "recovered",
    ]
    more = [
        f"(+) After {point.at}, {point.crossing} crosses, too, and tells more than these features."
        for point in points.values()
        if point.crossing
    ]
    return ["## The strongest attack", *markdown(header, rows), "", *more, *([""] if more else [])]


def _all_attacks(found: Found) -> list[str]:
    attacks = list(dict.fromkeys(cell.attack for cell in found))
    rows = [
        [at, *(figures(found[cell]) if (cell := Cell(at, attack)) in found else "" for attack in attacks)]
        for at in dict.fromkeys(cell.split for cell in found)
    ]
    return ["## All attacks", *markdown(["cut after", *(attack.title for attack in attacks)], rows), ""]


def _pictures(out: Path, found: Found) -> list[str]:
    """Draw the strongest attack at every split point, and all attacks at each; the lines that show it."""
    best = _strongest(found)
    if not best or results.read_truth(out / FOLDER).shape[1] not in (1, 3):
        return []
    make_folder(out / PICTURES)
    draw(out / OVERVIEW, out / FOLDER, [(cell, f"cut after {at}: {cell.attack.title}") for at, cell in best.items()])
    lines = ["## What they look like", f"![The strongest attacks]({OVERVIEW})", ""]
    for at in best:
        name = f"{PICTURES}/{file_name(at)}.png"
        draw(out / name, out / FOLDER, [(cell, cell.attack.title) for cell in found if cell.split == at])
        lines += [f"![Cut after {at}]({quote(name)})", ""]
    return lines


def _record(point: Point, result: Result) -> dict[str, Any]:
    """A result and its split point, as JSON values."""
    return {
        **asdict(result),
        "feature_shape": list(point.feature_shape),
        "edge_flops": point.flops,
        "accuracy": point.accuracy,
    }
