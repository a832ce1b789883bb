"""What a method is, and what it is called in the command, in the files, in tables and in figures."""

from collections.abc import Callable
from dataclasses import dataclass

import relp
from models import Rules


@dataclass(frozen=True)
class Method:
    """One way of scoring nodes.

    name       in the command and in the files
    label      in tables and figures
    lrp        the rules that are on, as relp.attribute takes them; None if there is nothing to say of rules
    steps      of Integrated Gradients
    attribute  a function (model, original, patch, answers, nodes, metric) -> scores to use instead of relp.attribute
    """

    name: str
    label: str
    lrp: bool | Rules | None = None
    steps: int | None = None
    attribute: Callable | None = None

    @property
    def options(self) -> dict:
        """What relp.attribute, or relp.propagate, is told so that it follows this method."""
        return {"lrp": self.lrp or False, "steps": self.steps}

    def scores(self, model, *arguments) -> dict:
        """{node: [batch, layer, pos, ...]}; arguments as relp.attribute takes them, up to the metric."""
        if self.attribute:
            return self.attribute(model, *arguments)
        return relp.attribute(model, *arguments, **self.options)


AP = Method("ap", "AP")  # its scores() is not used: score_pairs() is told how AP is run
ATP = Method("atp", "AtP")


def main_method(methods: list[str]) -> str:
    """The name of the method that others are compared with."""
    return "relp" if "relp" in methods else next((name for name in methods if name != "ap"), "ap")
