"""Makes course/relp.ipynb from course/lessons.py.

    python course/build.py              # the notebook, without outputs
    python course/build.py --execute    # runs it and keeps the outputs (needs nbclient and ipykernel)

lessons.py is in the "percent" format that Jupyter's editors open: a cell begins with a line "# %%", a text cell with
"# %% [markdown]", and tags follow in brackets, such as tags=["exercise"]. A text cell tagged "solution" shows its code
folded. That code takes the place of the exercise before it when the course is run with its solutions (`solved`).
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE, NOTEBOOK = HERE / "lessons.py", HERE / "relp.ipynb"
HEADER = re.compile(r"# %%(?P<text> \[markdown\])?(?: tags=(?P<tags>\[.*\]))?")


@dataclass(frozen=True)
class Cell:
    """One cell: its text, or its code."""

    source: str
    is_text: bool
    tags: tuple[str, ...] = ()


def cells(source: str) -> list[Cell]:
    """The cells of a script in percent format. ValueError on a header that is not understood."""
    found = []
    for block in re.split(r"^(?=# %%)", source, flags=re.M)[1:]:
        header, _, body = block.partition("\n")
        match = HEADER.fullmatch(header)
        if not match:
            raise ValueError(f"not the header of a cell: {header!r}")
        body = body.strip("\n")
        if match["text"]:
            body = re.sub(r"^# ?", "", body, flags=re.M)
        found.append(Cell(body, bool(match["text"]), tuple(json.loads(match["tags"] or "[]"))))
    return found


def solution_code(cell: Cell) -> str:
    return re.search(r"```python\n(.*?)\n```", cell.source, re.S)[1]


def solved(every: list[Cell]) -> list[Cell]:
    """The same cells with each exercise's code replaced by the solution that follows it."""
    result, exercise = list(every), None
    for i, cell in enumerate(every):
        if "exercise" in cell.tags:
            exercise = i
        elif "solution" in cell.tags:
            result[exercise] = replace(every[exercise], source=solution_code(cell))
    return result


def notebook(every: list[Cell]) -> dict:
    """The notebook of these cells, without outputs, as nbformat 4.5 has it."""
    of_cells = []
    for i, cell in enumerate(every):
        entry = {"cell_type": "markdown" if cell.is_text else "code", "id": f"cell-{i:02}", "metadata": {}}
        if cell.tags:
            entry["metadata"]["tags"] = list(cell.tags)
        if not cell.is_text:
            entry |= {"execution_count": None, "outputs": []}
        of_cells.append(entry | {"source": cell.source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": of_cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def executed(content: dict) -> dict:
    """The notebook after a run in the folder of the course, with outputs."""
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.reads(json.dumps(content), as_version=4)
    here = {"metadata": {"path": str(HERE)}}
    run = NotebookClient(nb, timeout=600, record_timing=False, coalesce_streams=True, resources=here)
    result = json.loads(nbformat.writes(run.execute()))
    for cell in result["cells"]:  # warnings speak of this machine: they go to its terminal
        for output in [o for o in cell.get("outputs", []) if o.get("name") == "stderr"]:
            print("".join(output["text"]), file=sys.stderr)
            cell["outputs"].remove(output)
    return result | {"metadata": content["metadata"]}  # without the version of this machine's Python


def main() -> None:
    parser = argparse.ArgumentParser(description="makes course/relp.ipynb from course/lessons.py")
    parser.add_argument("--execute", action="store_true", help="run it and keep the outputs")
    content = notebook(cells(SOURCE.read_text(encoding="utf-8")))
    if parser.parse_args().execute:
        content = executed(content)
    NOTEBOOK.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {NOTEBOOK}")


if __name__ == "__main__":
    main()
