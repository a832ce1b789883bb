"""Where RelP is least to be trusted: where it disagrees with AtP.

Both come from the same model, and neither needs AP. RelP is AtP's gradient with a few tensors held constant. Where that
changes a score much, the score hangs on the choice of rules, and its error is likely to be large.
"""

import numpy as np

DOUBT_NEEDS = "relp", "atp"  # both are needed; doubt is of the first


def doubts(scores: dict[tuple[str, str], np.ndarray]) -> dict[str, np.ndarray]:
    """{node: |RelP - AtP|} of those nodes that both have scored. It costs AtP's backward pass, and no run of AP.

    scores: {(method, node): of any shape}, such as scores of every pair, or their means. The doubt of a mean is the
    difference of the two means.
    """
    one, other = DOUBT_NEEDS
    nodes = [node for method, node in scores if method == one and (other, node) in scores]
    return {node: np.abs(scores[one, node] - scores[other, node]) for node in nodes}
