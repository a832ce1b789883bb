"""A model of one's own, as relp.py and resume.py want it: a small causal transformer with a norm that has the LN-rule.

import torch, relp
from support.own_model import OwnModel
from support.try_out import try_out

model = OwnModel()
original, patch, targets = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 5, 3, 4]]), torch.tensor([[6, 7]])
try_out(model, original, patch, targets, ["resid_pre", "mlp_out"], lrp=True)  # one line says what is wrong
print(relp.attribute(model, original, patch, targets, ["resid_pre", "mlp_out"], lrp=True))
"""

from types import SimpleNamespace

import torch


class OwnModel:
    nodes = ("resid_pre", "k", "v", "z", "mlp_out")  # in the order in which a hook sees them

    def __init__(self, n_layers=2, d=16, vocab=20, n_pos=16):
        def drawn(*shape):
            return torch.randn(*shape, generator=generator) / d**0.5

        generator = torch.Generator().manual_seed(0)
        self.config = SimpleNamespace(n_layers=n_layers)
        self.words, self.places, self.out = drawn(vocab, d), drawn(n_pos, d), 3 * drawn(vocab, d)
        self.layers = [{name: 2 * drawn(d, d) for name in ("q", "k", "v", "o", "up", "down")} for _ in range(n_layers)]

    def stream(self, tokens, lrp=False, hook=None):
        x = self.words[tokens] + self.places[: tokens.shape[1]]
        for layer in range(self.config.n_layers):
            x = self.block(layer, x, lrp, hook)
        return x

    def unembed(self, x, lrp=False, columns=None):
        return self.norm(x, lrp) @ (self.out if columns is None else self.out[columns]).T

    def norm(self, x, lrp):
        scale = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * (scale.detach() if lrp else scale)  # the LN-rule of Table 1

    def block(self, layer, x, lrp=False, hook=None, start=0, last=False):
        """One layer; start and last are for resume.py."""

        def node(name, y):
            return hook(name, layer, y) if hook and name in getattr(hook, "nodes", self.nodes) else y

        w, x = self.layers[layer], node("resid_pre", x)
        y = self.norm(x, lrp)
        k, v = (node(name, (y @ w[name]).unsqueeze(2)) for name in ("k", "v"))  # [batch, pos, head, d]
        if last:
            x, y = x[:, -1:], y[:, -1:]
        past = k.shape[1] - y.shape[1]
        hidden = torch.ones(y.shape[1], k.shape[1], dtype=torch.bool).triu(past + 1)  # the later positions
        scores = torch.einsum("bqd,bkhd->bhqk", y @ w["q"], k).masked_fill(hidden, -torch.inf)
        z = node("z", torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v))
        x = x + z.flatten(2) @ w["o"]
        return x + node("mlp_out", torch.tanh(self.norm(x, lrp) @ w["up"]) @ w["down"])
