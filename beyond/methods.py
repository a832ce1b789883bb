"""The methods and the sets of rules that the commands know by name."""

import re
from functools import partial

from beyond import paths, rivals, twopoint
from models import Rules
from support.scoring import AP, ATP, Method

NAMES = ("ap", "atp", "atp*", "relp", "twopoint", "best", "gim", "attnlrp", "cp-lrp", "ig", "eap-ig-5")
RIVALS = {"gim": ("GIM", rivals.gim), "attnlrp": ("AttnLRP", rivals.attnlrp), "cp-lrp": ("CP-LRP", rivals.cp_lrp)}
FLAGS = ("ln", "identity", "half", "ah")
NUMBERS = ("epsilon", "gamma")


def method(name: str, family: str, rules: str = "paper", steps: int = 10) -> Method:
    """The method of this name for a model of this family: one of NAMES, or rules joined by +, such as ln+ah.

    rules, steps: of relp and ig. In eap-ig-5 any number of steps will do. ValueError if the name is unknown, or if the
    method needs the family's rules and there are none.
    """
    match name:
        case "ap":
            return AP
        case "atp":
            return ATP
        case "atp*":
            return Method(name, "AtP*", attribute=rivals.atp_star)
        case "relp":
            return Method(name, "RelP" if rules == "paper" else f"RelP, {rules}", parse_rules(rules))
        case "twopoint":
            rules, rho = twopoint.TwoPoint(), twopoint.activations_and_rho
            return Method(name, "two-point", rules, attribute=twopoint.attribute, rho=rho)
        case "best":
            parts = (0.6, method("relp", family)), (0.4, method("twopoint", family))
            return Method(name, "best", mean_of=parts)  # where one is far off, the other often is not: README.md
        case "gim" | "attnlrp" | "cp-lrp":
            label, rules_of = RIVALS[name]
            return Method(name, label, rules_of(family))
        case "ig":
            return Method(name, "IG", steps=steps)
    if found := re.fullmatch(r"eap-ig-([1-9]\d{0,3})", name):
        m = int(found[1])
        return Method(name, f"EAP-IG, {m} steps", steps=m, attribute=partial(paths.eap_ig, steps=m))
    items = re.split(r"(?<!\de)\+", name)  # the + of gamma=1e+2 joins nothing
    if any(item.partition("=")[0] not in (*FLAGS, *NUMBERS) for item in items):
        known = ", ".join(NAMES)
        raise ValueError(f"unknown method {name!r}: choose from {known}, or rules joined by +, such as ln+ah")
    return Method(name, name, parse_rules(",".join(items)))


def parse_rules(text: str) -> bool | Rules:
    """True for "paper", Rules() for "none", else the rules that are named, separated by commas: ln,ah,epsilon=0.01."""
    if text in ("paper", "none"):
        return True if text == "paper" else Rules()
    fields = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if item in FLAGS:
            fields[name] = True
        elif name in NUMBERS and value:
            fields[name] = float(value)
        else:
            known = ", ".join([*FLAGS, *(f"{name}=X" for name in NUMBERS)])
            raise ValueError(f"unknown rule {item!r}: choose paper, none, or from {known}")
    return Rules(**fields)
