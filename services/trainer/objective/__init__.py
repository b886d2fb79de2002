"""The mathematics of the update: pure functions on tensors. No I/O, no Megatron, no parallelism."""
