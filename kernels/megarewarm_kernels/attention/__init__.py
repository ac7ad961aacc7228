"""Attention: which implementation runs, FlashAttention in Triton, rotary positions."""
