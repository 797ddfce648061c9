"""The two ways in which a run ends early on purpose."""


class ConfigError(Exception):
    """A person can fix this: what cannot be done, what was found, what is allowed, what to type. Exit code 2."""


class RunStopped(Exception):  # noqa: N818  it is an end, not an error of ours
    """A guard ended a run that could not have come right; the text is the cause in the manifest. Exit code 1."""
