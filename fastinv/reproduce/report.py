"""The report: the paper's tables with both figures, as text, as data and as pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastinv.experiment import results
from fastinv.experiment.cells import Cell
from fastinv.experiment.reporting import HOW_CHOSEN, draw, figures, markdown, recipe_table, write_text
from fastinv.experiment.results import Result
from fastinv.experiment.scores import RECOGNISABLE
from fastinv.experiment.target import MODELS
from fastinv.reproduce.paper import DATA, TABLES, Table, cells

REPORT, RECORDS = "report.md", "results.json"
OPTIMIZER_NAMES = {"adam": "Adam, as in the paper", "lbfgs": "L-BFGS, where the paper has Adam"}
Found = dict[Cell, Result]

HEAD = (
    "# The paper's tables, measured again\n"
    "He, Zhang and Lee, *Model Inversion Attacks Against Collaborative Inference*, ACSAC 2019. An entry is the mean "
    "PSNR in dB and the mean SSIM of recovered test images, and the share of them that can be recognised (an SSIM of "
    f"{RECOGNISABLE} or more); in brackets the paper's figures. What has none but the paper's has not run.\n"
)


def write_report(out: Path) -> Path:
    """Write `report.md`, `results.json` and pictures of all targets that have results in a folder; the report's path.

    Raises:
        FormatError: a result cannot be read, or the report not be written.
    """
    text, records = [HEAD], []
    for model in MODELS.values():
        folder = out / model.name
        if not results.knows_target(folder):
            continue
        found = {cell: result for cell in cells(model.name) if (result := results.read(folder, cell)) is not None}
        text += _section(model.name, folder, found)
        text += _pictures(out, model.name, found)
        records += [_record(model.name, cell, result) for cell, result in found.items()]
    path = out / REPORT
    write_text(path, "\n".join(text))
    write_text(out / RECORDS, json.dumps(records, indent=1) + "\n")
    return path


def _record(target: str, cell: Cell, result: Result) -> dict[str, Any]:
    """A result and the paper's figures for it, as JSON values."""
    psnr, ssim = cell.attack.published.get(cell.split, (None, None))
    return {"target": target, **asdict(result), "paper_psnr": psnr, "paper_ssim": ssim}


def _section(target: str, folder: Path, found: Found) -> list[str]:
    settings, known = results.read_settings(folder), results.read_target(folder)
    limit = "" if settings["images"] is None else f" at most {settings['images']:,} images of"
    lines = [
        f"## {target}, for the paper's {DATA[target]}",
        f"On `{settings['data']}`, seed {settings['seed']}: the target learned for {settings['target_epochs']} epochs "
        f"on one half of the training set, and puts {known['accuracy']:.2%} of the test images into their class; "
        f"attackers have{limit} a half; inverse networks learned for {settings['inverse_network_epochs']} epochs, "
        f"shadows for {settings['shadow_epochs']}; all in {settings['precision']}. "
        f"Scored: {settings['scored']:,} test images.",
        "",
    ]
    for table in TABLES.values():
        if any(Cell(split, attack) in found for split in table.splits(target) for attack in table.attacks):
            lines += [f"### {table.title}", *(_by_layer if table.layers else _by_attack)(table, target, found), ""]
    recipes = {cell: result for cell, result in found.items() if result.recipe}
    if recipes:
        lines += [
            "### How rMLE was set",
            f"By {OPTIMIZER_NAMES[settings['optimizer']]}. {HOW_CHOSEN.format(next(iter(recipes.values())).chosen_on)}",
            "",
            *recipe_table(recipes),
            "",
        ]
    return lines


def _by_attack(table: Table, target: str, found: Found) -> list[str]:
    splits = table.splits(target)
    rows = [[a.title, *(_entry(Cell(at, a), found) for at in splits)] for a in table.attacks]
    return markdown(["", *splits], rows)


def _by_layer(table: Table, target: str, found: Found) -> list[str]:
    rows = [[at, *(_entry(Cell(at, a), found) for a in table.attacks)] for at in table.splits(target)]
    return markdown(["cut after", *(attack.title for attack in table.attacks)], rows)


def _entry(cell: Cell, found: Found) -> str:
    result = found.get(cell)
    text = "" if result is None else figures(result)
    if cell.split in cell.attack.published:
        psnr, ssim = cell.attack.published[cell.split]
        text += f" ({psnr:.2f} / {ssim:.3f})"
    return text.strip()


def _pictures(out: Path, target: str, found: Found) -> list[str]:
    """Draw what was recovered at each split point of the tables, and layer by layer; the lines that show it."""
    folder = out / target
    drawings = {
        at: [(cell, cell.attack.title) for cell in found if cell.split == at] for at in TABLES["3"].splits(target)
    }
    layers = TABLES["layers"]
    by_layer = [Cell(at, attack) for at in layers.splits(target) for attack in layers.attacks]
    drawings["layers"] = [(cell, f"{cell.attack.title}, cut after {cell.split}") for cell in by_layer if cell in found]
    lines = []
    for name, rows in drawings.items():
        if rows:
            file = out / f"{target}-{name}.png"
            draw(file, folder, rows)
            lines += [f"![{target}, {name}]({file.name})", ""]
    return ["### What they look like", *lines] if lines else []
