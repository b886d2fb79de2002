"""The suite without Docker: the same services as local processes, and the `forage` command. Imports only the contract."""
