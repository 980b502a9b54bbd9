"""Errors a user can meet, each with a stable code, an exit status and a hint what to do."""

from __future__ import annotations


class NsaConvertError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: One sentence that says what is wrong.
        code: Stable identifier, listed by ``nsa-convert explain``.
        where: File, tensor, key or option concerned.
        expected: What would have been accepted.
        found: What was given.
        hint: What to do next.

    Attributes:
        problems: The single errors, where this one sums up several.
    """

    exit_status = 1
    default_code = "NC01"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint
        self.problems: tuple[NsaConvertError, ...] = ()


class UsageError(NsaConvertError):
    """The command line asks for something impossible (exit 2)."""

    exit_status = 2
    default_code = "CL02"


class ConfigError(NsaConvertError, ValueError):
    """A configuration or recipe is wrong; every problem found is in the message (exit 3)."""

    exit_status = 3
    default_code = "CF13"


class UnsupportedModelError(NsaConvertError):
    """The architecture is not one that can be converted (exit 3)."""

    exit_status = 3
    default_code = "CF12"


class CheckpointError(NsaConvertError):
    """The checkpoint on disk is damaged, incomplete or hostile (exit 3)."""

    exit_status = 3
    default_code = "CK23"


class CheckFailedError(NsaConvertError):
    """A verification or an evaluation gate did not hold (exit 4)."""

    exit_status = 4
    default_code = "CK29"


class CacheError(NsaConvertError, ValueError):
    """This model would be wrong if it continued from this key/value cache (exit 3)."""

    exit_status = 3
    default_code = "CA01"


class BackendError(NsaConvertError):
    """A kernel backend cannot run here (exit 5)."""

    exit_status = 5
    default_code = "KN14"


class MachineError(NsaConvertError):
    """Disk, memory, permission or a missing dependency (exit 5)."""

    exit_status = 5
    default_code = "SV02"


class HubError(NsaConvertError):
    """The Hub or the network refused or failed (exit 6)."""

    exit_status = 6
    default_code = "HB01"
