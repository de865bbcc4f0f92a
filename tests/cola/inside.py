"""Plain models with auxiliaries inside, as back-propagation has them, written without anything of ot_ray.cola's.

The nets have a site of every type; the auxiliaries here are PyTorch's own layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

KINDS = ("low_rank", "linear", "mlp")
RANK, ALPHA = 3, 5.0
VOCAB, CLASSES = 11, 4


class TextNet(nn.Module):
    """Ids [B, T] to logits [B, T, VOCAB], by an embedding, a convolution, a `Conv1D` and a linear map."""

    patterns = ("table", "over_time", "gpt", "plain")

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 6)
        self.over_time = nn.Conv1d(6, 7, kernel_size=3, padding=2, dilation=2)
        self.gpt = Conv1D(5, 7)
        self.plain = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.over_time(self.table(ids).mT)).mT.contiguous()
        return self.head(self.norm(torch.tanh(self.plain(torch.tanh(self.gpt(hidden))))))


class ImageNet(nn.Module):
    """Images [B, 3, 8, 8] to logits [B, CLASSES], by convolutions of every stride and size."""

    patterns = ("first", "second", "last")

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, kernel_size=3, stride=2, padding="valid")
        self.second = nn.Conv2d(5, 4, kernel_size=(1, 2), padding=(1, 0), bias=False)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(images))))
        return self.last(hidden.mean(dim=(2, 3)))


def net(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A net in float64."""
    torch.manual_seed(seed)
    made = kind().double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made


def inputs(kind: type[nn.Module], batch: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind is TextNet:
        return torch.randint(VOCAB, (batch, 6), generator=generator)
    return torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)


def row_losses(logits: Tensor, seed: int = 2) -> Tensor:
    """A loss of each row, [B]; whose own alone."""
    wanted = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (logits - wanted).pow(4).flatten(1).mean(dim=1)


class OneInside(nn.Module):
    """One auxiliary of a site. Its parameters come in the order of `Auxiliary.parts`."""

    def __init__(self, base: nn.Module, kind: str, rank: int = RANK) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layers(base, kind, rank)).double()
        self.relu, self.scale = kind == "mlp", 1.0 if kind == "linear" else ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if self.relu and place == len(self.layers) - 2:
                x = torch.relu(x)
        return x * self.scale


class Added(nn.Module):
    """A bias as a layer of its own, since an embedding has none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def _layers(base: nn.Module, kind: str, rank: int) -> list[nn.Module]:
    mlp = kind == "mlp"
    if isinstance(base, nn.Embedding):
        size, out = base.num_embeddings, base.embedding_dim
        if kind == "linear":
            return [nn.Embedding(size, out)]
        return [nn.Embedding(size, rank), *([Added(rank)] if mlp else []), nn.Linear(rank, out, bias=mlp)]
    if isinstance(base, nn.Conv1d | nn.Conv2d):
        made = type(base)
        options = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        if kind == "linear":
            return [made(base.in_channels, base.out_channels, base.kernel_size, bias=False, **options)]
        return [
            made(base.in_channels, rank, base.kernel_size, bias=mlp, **options),
            made(rank, base.out_channels, 1, bias=mlp),
        ]
    size, out = (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)
    if kind == "linear":
        return [nn.Linear(size, out, bias=False)]
    return [nn.Linear(size, rank, bias=mlp), nn.Linear(rank, out, bias=mlp)]


class Inside(nn.Module):
    """A site with every customer's auxiliary inside: each row goes by itself.

    `shares` is None where a row goes through its own customer's, else what everybody's is multiplied by.
    """

    def __init__(
        self, base: nn.Module, ones: Mapping[str, nn.Module], rows: Sequence[str], shares: Mapping[str, float] | None
    ) -> None:
        super().__init__()
        self.base, self.ones, self.rows, self.shares = base, nn.ModuleDict(ones), rows, shares

    def forward(self, x: Tensor) -> Tensor:
        if self.shares is not None:
            return self.base(x) + sum(share * self.ones[name](x) for name, share in self.shares.items())
        each = [self.ones[name](x[row : row + 1]) for row, name in enumerate(self.rows)]
        return self.base(x) + torch.cat(each)


def with_inside(
    base: nn.Module,
    sites: Sequence[str],
    kinds: Mapping[str, tuple[str, int]],
    rows: Sequence[str],
    shares: Mapping[str, float] | None = None,
) -> tuple[nn.Module, dict[str, dict[str, OneInside]]]:
    """A copy of a net with customers' auxiliaries, random and nowhere zero, inside; and those, by customer and site."""
    twin = copy.deepcopy(base).requires_grad_(False)
    made: dict[str, dict[str, OneInside]] = {name: {} for name in kinds}
    generator = torch.Generator().manual_seed(7)
    for site in sites:
        module = twin.get_submodule(site)
        for name, (kind, rank) in kinds.items():
            one = made[name][site] = OneInside(module, kind, rank)
            for parameter in one.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        twin.set_submodule(site, Inside(module, {name: made[name][site] for name in kinds}, rows, shares))
    return twin, made


def tensors_of(ones: Mapping[str, OneInside], gradients: bool = False) -> dict[str, list[Tensor]]:
    """By site, parameters or their gradients, as `Auxiliary.parts` has them."""
    found = {}
    for site, one in ones.items():
        found[site] = [(parameter.grad if gradients else parameter).detach() for parameter in one.parameters()]
        if isinstance(one.layers[0], nn.Embedding) and len(found[site]) == 2:
            # PEFT's factor of an embedding is the table's transpose.
            found[site][0] = found[site][0].t()
    return found
