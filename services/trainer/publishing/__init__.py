"""How a policy version reaches the engines: over the volume, or pushed."""
