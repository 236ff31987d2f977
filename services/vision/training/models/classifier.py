"""What every network of this folder offers: features of a picture, and a linear classifier on them."""

from __future__ import annotations

from torch import Tensor, nn


class Classifier(nn.Module):
    """A network that ends in `self.classifier`, a linear layer on `features`."""

    classifier: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, F]`: what the classifier sees."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, classes]` logits."""
        logits: Tensor = self.classifier(self.features(image))
        return logits


def initialise_he(module: nn.Module) -> None:
    """He initialisation by fan-out for a convolution (He et al. 2015, equation 14); everything else stays."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
