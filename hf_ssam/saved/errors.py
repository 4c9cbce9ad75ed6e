"""What a user can mend."""


class UsageError(Exception):
    """The user's input cannot work; the message is one sentence with the way out."""
