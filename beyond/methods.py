"""The methods and the sets of rules that the command knows by name."""

import re
from dataclasses import dataclass
from functools import partial

from beyond import atp_star, paths, twopoint
from beyond.rivals import ATTNLRP, CP_LRP, GIM
from beyond.temperature import Temperature
from beyond.twopoint import ROWS, TWO_POINT, TwoPoint
from models import Rules
from support.experts import RouterRules
from support.methods import AP, ATP, Method

NAMES = (
    *("ap", "atp", "atp*", "relp", "twopoint", "gim", "attnlrp", "cp-lrp"),
    *("eg", "eg-10", "ig", "eap-ig-5", "eap-ig-act-5"),
)
FLAGS = ("ln", "identity", "half", "ah", "router")
NUMBERS = ("epsilon", "gamma", "temperature")


def method(name: str, family: str = "", rules: str = "paper", steps: int = 10) -> Method:
    """The method of this name for a model of this family: one of NAMES, or rules joined by +, such as ln+ah.

    Where a name ends in a number, any from 1 to 9999 will do.

    rules, steps: of relp and ig. ValueError if the name is unknown.
    """
    match name:
        case "ap":
            return AP
        case "atp":
            return ATP
        case "atp*":
            return Method(name, "AtP*", attribute=atp_star.attribute)
        case "relp":
            return Method(name, "RelP" if rules == "paper" else f"RelP, {rules}", parse_rules(rules))
        case "twopoint":
            return Method(name, "two-point", TWO_POINT.get(family), attribute=twopoint.attribute)
        case "gim":
            return Method(name, "GIM", GIM.get(family))
        case "attnlrp":
            return Method(name, "AttnLRP", ATTNLRP.get(family))
        case "cp-lrp":
            return Method(name, "CP-LRP", CP_LRP.get(family))
        case "eg":
            return Method(name, "EG", attribute=paths.expected_gradients)
        case "ig":
            return Method(name, "IG", steps=steps)
    if name.startswith(("eg-", "eap-ig")):
        return on_a_path(name)
    try:
        return Method(name, name, parse_rules(name.replace("+", ",")))
    except UnknownRule:
        known = ", ".join(NAMES)
        raise ValueError(f"unknown method {name!r}: choose from {known}, or rules joined by +, such as ln+ah") from None
    except ValueError as error:
        raise ValueError(f"method {name}: {error}") from None


def on_a_path(name: str) -> Method:
    """eg-10, eap-ig-5, eap-ig-act-5, or another number. The steps of eap-ig-5 are for edges, where it is known too."""
    found = re.fullmatch(r"(eg|eap-ig|eap-ig-act)-([1-9]\d{0,3})", name)
    if not found:
        raise ValueError(f"method {name!r}: a number of steps from 1 to 9999 is needed, as in eg-10 or eap-ig-5")
    kind, n = found[1], int(found[2])
    if kind == "eg":
        return Method(name, f"EG, {n} draws", attribute=partial(paths.expected_gradients, draws=n))
    if kind == "eap-ig":
        return Method(name, f"EAP-IG, {n} steps", steps=n, attribute=partial(paths.eap_ig_inputs, steps=n))
    return Method(name, f"EAP-IG-act, {n} steps", attribute=partial(paths.eap_ig_activations, steps=n))


def without_number(name: str) -> str:
    """The name without its number: eap-ig of eap-ig-5."""
    return re.sub(r"-\d+$", "", name)


class UnknownRule(ValueError):
    """There is no rule of this name."""


def is_method(name: str) -> bool:
    try:
        return bool(method(name))
    except ValueError:
        return False


@dataclass(frozen=True)
class TwoPointTemperature(TwoPoint, Temperature):
    """Two-point rows, and a temperature for the softmax."""

    def __post_init__(self):
        super().__post_init__()
        if "attention" in self.two_point:
            raise ValueError("temperature and attention2 both say what the softmax passes back: choose one")


def parse_rules(text: str) -> bool | Rules:
    """True for "paper", Rules() for "none", else the rules that are named, separated by commas; ln2 is two-point ln."""
    if text in ("paper", "none"):
        return True if text == "paper" else Rules()
    fields, two_point = {}, []
    for item in text.split(","):
        name, given, value = item.partition("=")
        if name in FLAGS and not given:
            fields[name] = True
        elif name.endswith("2") and name[:-1] in ROWS and not given:
            two_point.append(name[:-1])
        elif name in NUMBERS:
            fields[name] = parse_number(name, value)
        else:
            known = ", ".join([*FLAGS, *(f"{name}=X" for name in NUMBERS), *(f"{row}2" for row in ROWS)])
            raise UnknownRule(f"unknown rule {item!r}: choose paper, none, or from {known}")
    if "router" in fields:
        if two_point or "temperature" in fields:
            raise ValueError("router goes with the rules of Table 1 only, not with temperature or two-point rows")
        return RouterRules(**fields)
    if two_point:
        fields["two_point"] = tuple(two_point)
        return TwoPointTemperature(**fields) if "temperature" in fields else TwoPoint(**fields)
    return Temperature(**fields) if "temperature" in fields else Rules(**fields)


def parse_number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"rule {name} needs a number, as in {name}=0.01, got {f'{name}={text}'!r}") from None
    return value
