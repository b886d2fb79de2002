"""What stops `prepare`: one message for a person, saying what is wrong, where, and the mend."""


class PrepareError(Exception):
    """An output could not be made. Nothing half-made is left under its real name."""
