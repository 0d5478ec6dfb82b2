"""Example-level clipping with one ordinary backward pass: a grad-sample mode of our own on Opacus' base classes."""

from lichen.common.privacy.single_backward.module import SingleBackwardModule

__all__ = ["SingleBackwardModule"]
