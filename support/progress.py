"""Progress bars, in a terminal and in a notebook; none where the output goes into a file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float], None]]:
    """A bar for relp.activation_patching:

    with progress_bar("AP") as progress:
        scores = relp.activation_patching(..., progress=progress)
    """
    with tqdm(total=1.0, desc=title, leave=False, disable=None, delay=2, bar_format=BAR) as bar:
        yield lambda part: bar.update(part - bar.n)
