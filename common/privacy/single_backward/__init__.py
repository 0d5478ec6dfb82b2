"""Example-level clipping with one ordinary backward pass: a grad-sample mode of our own on Opacus' base classes."""
