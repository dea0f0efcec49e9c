"""Networks that are awkward to replay, each in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.zoo.cifar_resnet import BasicBlock
from lightning_prune.zoo.cnn import SmallCNN


class Residual(nn.Module):
    """Two basic blocks; shortcuts without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 8, stride=2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class InPlace(nn.Module):
    """ReLUs that overwrite their input, which the shortcut then sees overwritten, and additions in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(self.drop(self.relu(x)))
        y += x  # x has been through the ReLU
        z = self.third(y)
        return self.head(z.sub_(0.1) * y)  # type: ignore[no-any-return]


class Halving(nn.Module):
    """Writes into its input, and returns something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5) + 1.0


class Views(nn.Module):
    """Outputs that are views of others, which are written into through them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.halving, self.same, self.flat = Halving(), nn.Identity(), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        y = self.halving(x) - x  # x is halved by now
        z = self.flat(self.same(y))
        z.mul_(3.0)
        return self.head(self.second(y) + z)  # type: ignore[no-any-return]


class Shared(nn.Module):
    """One layer called three times, one weight used by two layers and functionally, before its layer is called."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.again.weight
        self.loose = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = functional.linear(x, self.loose.weight[:8].t()).tanh()
        for _ in range(3):
            x = self.again(x).tanh()
        return self.head(self.loose(self.tied(x)))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Branches that meet, run later ones first."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.right = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        right = self.right(x)
        return self.head(torch.cat([self.left(x), right], dim=1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Projections that are used without a module of their own, and a hook whose find is used later."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.embed(x.unflatten(1, (2, 4)).repeat(1, 1, 2)))
        return self.head(self.recurrent(x)[0].mean(dim=1))  # type: ignore[no-any-return]


class Noting(nn.Module):
    """Modules that leave something behind for later ones: in attributes, a list and a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Tensor] = []
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.outer = nn.Sequential(self.inner, nn.Linear(8, 8))
        self.keeper = Keeper()
        self.wrapped = nn.Sequential(self.keeper, nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.inner[0].register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.notes.append(output)

    def forward(self, x: Tensor) -> Tensor:
        self.notes.clear()
        x = self.wrapped(self.outer(x))
        return self.head(x + self.keeper.kept + self.notes[0])  # type: ignore[no-any-return]


class Keeper(nn.Module):
    """Leaves its output in an attribute, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.linear(x)
        return torch.sin(self.kept)


class Choosing(nn.Module):
    """What runs depends on the data: pruned or not, another branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.plus = nn.Linear(8, 8)
        self.minus = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.plus(x) if x.mean() > 0 else self.minus(x)
        return self.head(x)  # type: ignore[no-any-return]


class Counting(nn.Module):
    """Counts its calls in a buffer, and its output depends on the count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.first(x) * self.calls)  # type: ignore[no-any-return]


class Random(nn.Module):
    """Drops values in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.dropout(self.first(x), 0.5, training=True))  # type: ignore[no-any-return]


class Moody(nn.Module):
    """Runs its layers in another order every time."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        first, second = (self.one, self.two) if self.turn % 2 else (self.two, self.one)
        return self.head(second(first(x)))  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def small_cnn() -> nn.Module:
    return SmallCNN(channels=(4, 8), num_classes=3)


FLAT = [mlp, InPlace, Views, Shared, Branches, Attention, Noting, Choosing, Counting]
IMAGES = [small_cnn, Residual]


def build(make: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = make().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return network


def batch_for(make: Any, examples: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (examples, 1, 8, 8) if make in IMAGES else (examples, 8)
    return torch.randn(shape, generator=generator), torch.randint(3, (examples,), generator=generator)
