"""GIM's softmax temperature (Edin et al. 2025, arXiv 2505.17630), for comparison: one of the parts of that method."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from models import Attend, Rules, backward_as, check_parameter


@dataclass(frozen=True)
class Temperature(Rules):
    """Attention passes back the derivative of the softmax of scores / T, without that function's own 1 / T."""

    temperature: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.temperature is not None:
            check_parameter("temperature", self.temperature)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        if self.temperature is None:
            return super().attention(q, k, v, attend)

        def softmax(scores: Tensor) -> Tensor:
            return backward_as(attend.softmax(scores), self.temperature * attend.softmax(scores / self.temperature))

        return super().attention(q, k, v, partial(attend.by_hand, softmax=softmax))
