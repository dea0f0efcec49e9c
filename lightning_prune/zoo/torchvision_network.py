"""Any network of torchvision by its name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import get_model, list_models

from lightning_prune.targets import closest


def torchvision_network(
    name: str, num_classes: int | None = None, weights: str | None = None, **kwargs: Any
) -> nn.Module:
    """Build a torchvision network.

    Args:
        name: As `torchvision.models.list_models()` spells it, such as `resnet18`.
        num_classes: Classes; None takes torchvision's default, or what `weights` were trained for.
        weights: Pretrained weights to download, such as `DEFAULT` or `IMAGENET1K_V1`; None starts anew.
        **kwargs: Further arguments of torchvision's builder, such as `dropout` or `aux_logits`.

    Raises:
        ValueError: No network has this name; the closest names are listed.

    Example:
        >>> torchvision_network("resnet18", num_classes=10).fc.out_features
        10
        >>> torchvision_network("resnt18")
        Traceback (most recent call last):
        ...
        ValueError: torchvision has no network named 'resnt18'; did you mean ...'resnet18'...
    """
    known = list_models()
    if name.lower() not in known:
        raise ValueError(f"torchvision has no network named {name!r}; did you mean {closest(name.lower(), known)}?")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    network: nn.Module = get_model(name, weights=weights, **kwargs)
    return network
