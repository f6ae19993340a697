"""Code that several test files import by name: `from helpers.state import same_state`."""
