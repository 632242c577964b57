"""The exceptions of cspdeploy, each with the exit code that the command line gives it.

A failed check is not an exception: it is a report with a verdict (exit 1).
An exception means that the job could not be done.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CspDeployError",
    "DeviceMemoryError",
    "InputError",
    "InterruptedRunError",
    "MissingExtraError",
    "RuntimeUnavailableError",
    "TamperedError",
    "did_you_mean",
]

EXIT_OK = 0
EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_ENGINE = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class CspDeployError(Exception):
    """Base of all errors meant for the user: one line that says what is wrong, one that says what to do.

    Args:
        message: subject, what was got, what was expected.
        fix: the command or edit that mends it; empty when there is none.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.facts: dict[str, str] = {}
        """What a program that reads the error may want besides: the "manifest_sha256" of the bundle that it is of."""

    def __str__(self) -> str:
        return f"{self.message} (fix: {self.fix})" if self.fix else self.message


class InputError(CspDeployError):
    """Wrong use or bad input: a file, a name, an option, an image."""


class TamperedError(CspDeployError):
    """A file of a bundle is not the file that its manifest describes."""

    exit_code = EXIT_CHECK_FAILED


class RuntimeUnavailableError(CspDeployError):
    """An engine or device that was asked for is not here, or did not take the work."""

    exit_code = EXIT_NO_ENGINE


class DeviceMemoryError(InputError):
    """The device has no room for the work. Nothing of it is left there: what was allocated has been given back."""


class InterruptedRunError(CspDeployError):
    """The user stopped a run that can be resumed."""

    exit_code = EXIT_INTERRUPTED


class MissingExtraError(CspDeployError):
    """A command needs packages of an extra that is not installed."""

    exit_code = EXIT_NO_ENGINE

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package '{package}', which is not installed",
            fix=f"pip install 'cspdeploy[{extra}]'",
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The start of a fix: a question that names the nearest of `known`, or nothing where none is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'? " if near else ""
