"""The learner on Megatron-Core: one code path on CPU and GPU, with what a CPU lacks supplied in `cpu.py`."""
