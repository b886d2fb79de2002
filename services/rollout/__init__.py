"""The rollout service: an SGLang engine and the worker that plays search episodes with it."""
