"""Every error that a user can meet: a number (also the exit code), what was wrong, where, and what to do.

A number is never reused; docs/errors.md has a paragraph for each, and a test compares the two. Under differential privacy a
number is all that an agent tells the coordinator of a failure, because texts may quote rows (see common/records.py).
"""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """Error numbers, which are also exit codes (0 to 125, away from the shell's own)."""

    # 10: general
    INTERNAL = 10
    INTERRUPTED = 11
    EXTRA_MISSING = 12
    OUTPUT_EXISTS = 13
    OUTPUT_UNUSABLE = 14
    CHECK_FAILED = 15
    DEVICE_MISSING = 16
    # 20: plan
    PLAN_UNREADABLE = 20
    PLAN_INVALID = 21
    PLAN_UNSOUND = 22
    PLAN_VERSION = 23
    # 30: model and task
    MODEL_NOT_FOUND = 30
    MODEL_UNSUPPORTED = 31
    MODEL_DP_UNSUPPORTED = 32
    STATE_MISMATCH = 33
    MODEL_NOT_TRAINED = 34
    # 40: data
    DATA_NOT_FOUND = 40
    DATA_FIELD = 41
    DATA_ROW = 42
    DATA_EMPTY = 43
    DATA_LABEL = 44
    DATA_DECLARED_SIZE = 45
    DATASET_UNKNOWN = 46
    PARTITION_INVALID = 47
    DATA_FORMAT = 48
    # 50: privacy and policy
    PRIVACY_BUDGET = 50
    PRIVACY_SELF_CHECK = 51
    PRIVACY_HISTORY = 52
    PRIVACY_TARGET = 53
    POLICY_REFUSED = 54
    POLICY_INVALID = 55
    POLICY_APPROVAL = 56
    LEDGER_BROKEN = 57
    LEDGER_BEHIND = 58
    PRIVACY_REFUTED = 59
    # 60: channel
    CONNECT_FAILED = 60
    PAYLOAD_CORRUPT = 61
    FRAME_INVALID = 62
    PROTOCOL_VERSION = 63
    CODEC_MISMATCH = 64
    MODEL_BEHIND = 65
    CLOCK_WRONG = 66
    LEDGER_MOVED = 67
    # 70: keys, certificates, enrolment
    CERTIFICATE_MISSING = 70
    CERTIFICATE_EXPIRED = 71
    CERTIFICATE_FOREIGN = 72
    CERTIFICATE_REVOKED = 73
    CERTIFICATE_INVALID = 74
    INVITE_INVALID = 75
    INVITE_EXPIRED = 76
    INVITE_USED = 77
    NAME_TAKEN = 78
    KEY_EXPOSED = 79
    # 80: coordinator
    HOME_MISSING = 80
    HOME_IN_USE = 81
    SERVICE_UNREACHABLE = 82
    RUN_UNKNOWN = 83
    NODE_UNKNOWN = 84
    COHORT_TOO_SMALL = 85
    STORE_VERSION = 86
    BACKUP_INVALID = 87
    RUN_STOPPED = 88
    ROUND_FAILED = 89
    # 100: agent
    AGENT_HOME_MISSING = 100
    AGENT_IN_USE = 101
    WORKER_FAILED = 102
    WORKER_DEADLINE = 103
    NO_MODEL = 104
    ALREADY_ENROLLED = 105
    AGENT_PAUSED = 106


def name_of(code: int) -> str:
    """A code's name as people read it, such as ``privacy-budget``; ``unknown`` for a number that is none."""
    return Code(code).name.lower().replace("_", "-") if code in set(Code) else "unknown"


class LichenError(Exception):
    """An error with a number, told as: what was wrong, where, what to do.

    Args:
        code: its number, documented in docs/errors.md.
        what: what was wrong, with the offending value.
        where: the file, key, row or address it concerns; empty if ``what`` says it.
        fix: what the reader can do about it.
    """

    def __init__(self, code: Code, what: str, *, where: str = "", fix: str = "") -> None:
        self.code = code
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        fix = f"\n  {self.fix}" if self.fix else ""
        return f"error {int(self.code)} ({name_of(self.code)}): {where}{self.what}{fix}"

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip between processes (Ray copies exceptions)."""
        return (_rebuild, (int(self.code), self.what, self.where, self.fix))


def _rebuild(code: int, what: str, where: str, fix: str) -> LichenError:
    return LichenError(Code(code), what, where=where, fix=fix)
