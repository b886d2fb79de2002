"""Megatron GRPO: graded groups in, policy versions out."""
