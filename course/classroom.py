"""What the lessons share: showing a picture, and checking an answer."""

import os
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = "COURSE_PICTURES"  # the environment variable with the folder into which the script writes its pictures
shown = 0


def show(figure: Figure) -> None:
    """Shows the figure in a notebook. In a script, writes it into the folder COURSE_PICTURES if there is one."""
    global shown
    shown += 1
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from IPython.display import Image, display

        file = BytesIO()
        figure.savefig(file, format="png", dpi=90, metadata={"Software": None})
        display(Image(file.getvalue()))
    elif os.environ.get(FOLDER):
        folder = Path(os.environ[FOLDER])
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"picture-{shown:02}.png", dpi=90)


def check(answer, is_right: Callable, right: str, hint: str) -> None:
    """Says in a sentence whether is_right(answer). None is no answer yet; an error in is_right is a wrong answer."""
    if answer is None:
        print("No answer yet.")
        return
    try:
        verdict = bool(is_right(answer))
    except Exception as error:  # whatever a student's answer may raise
        verdict, hint = False, f"{hint} ({type(error).__name__}: {error})"
    print(f"Right. {right}" if verdict else f"Wrong. {hint}")
