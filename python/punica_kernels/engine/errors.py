"""What a user's input can get wrong: a file, an adapter, a request. Anything else that is raised is a defect."""


class EngineError(ValueError):
    """One line that says what is wrong with the input and, where there is one, what would work."""
