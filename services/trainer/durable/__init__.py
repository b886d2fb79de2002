"""What survives a crash: the ledger, checkpoints, and waiting for a full disk."""
