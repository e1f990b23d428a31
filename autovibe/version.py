"""The version, said once: the build, the API and the CLI read it here."""

__version__ = "0.1.0"
