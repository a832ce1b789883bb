"""Other published rules at RelP's price, two forward passes and one backward: GIM, AttnLRP and CP-LRP, for comparison.

    row                 RelP           GIM                       AttnLRP        CP-LRP
    ln                  x [1 / s]      as RelP                   as RelP        as RelP
    identity            x [phi(x)]     no rule                   as RelP        as RelP
    half                half of a*b    as RelP                   as RelP        as RelP
    q . k               no rule        half                      half           constant
    softmax             no rule        derivative at scores / 2  no rule        constant
    pattern . v         no rule        half                      half           of v only: the AH-rule

Linear layers have the 0-rule everywhere, as in RelP. README.md in this folder says where published code differs.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from beyond.temperature import Temperature
from models import TABLE_4, Attend, backward_as


@dataclass(frozen=True)
class HalfProducts(Temperature):
    """products: the Half-rule, which Table 1 has for gates, for both matrix products of attention as well.

    Each factor of q . k and of pattern . v gets half of what it would get. A pattern depends on q and k by both
    products. So what reaches v is halved, and what reaches q and k is quartered.
    """

    products: bool = False

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        if not self.products:
            return super().attention(q, k, v, attend)
        return halved(super().attention(halved(q), halved(k), v, attend))


def halved(x: Tensor) -> Tensor:
    """x, of which half the gradient goes back. Half of a bilinear product's: to halve it is to halve each factor's."""
    return backward_as(x, 0.5 * x)


# GIM (Edin et al. 2025, arXiv 2505.17630): with the signal g, pattern A = softmax(S), S_ij = q_i . k_j * scale, and
# P = softmax(S / 2),
#
#     dA_ij = g_i . v_j / 2    dS_ij = P_ij (dA_ij - sum_m P_im dA_im)    dq_i = sum_j dS_ij k_j scale / 2    (k alike)
#     dv_j = sum_i A_ij g_i / 2    norms frozen    gate and up: half each    the activation's own derivative
#
# The published code names the products 1/4 for q and k, and 1/2 for v. It leaves out the 1/2 of softmax(S / 2)'s own
# derivative, as Temperature does.
GIM = {
    family: HalfProducts(ln=True, half=rules.half, temperature=2.0, products=True) for family, rules in TABLE_4.items()
}

# AttnLRP (Achtibat et al. 2024, arXiv 2402.05602): the paper's rules of Table 4, and `products`. Its softmax rule,
#
#     R_i = x_i (R_i' - s_i sum_j R_j')    R' at the output s, a Taylor expansion at x
#
# is the plain gradient: with R' = s . rho' it is x_i times s_i (rho_i' - sum_j s_j rho_j'), softmax's derivative.
# Its epsilon in linear layers, 1e-6 or less, is left out: the 0-rule.
ATTNLRP = {family: HalfProducts(**vars(rules), products=True) for family, rules in TABLE_4.items()}

# CP-LRP (Ali et al. 2022, "conservative propagation"): the pattern is constant, z_j = sum_i [A_ij] v_i. Beside it, the
# paper's rules of Table 4.
CP_LRP = {family: replace(rules, ah=True) for family, rules in TABLE_4.items()}
