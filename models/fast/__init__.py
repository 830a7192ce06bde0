"""Fused forms of what `models` computes, with the same results."""
