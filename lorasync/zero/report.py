"""What the guard says: findings with a stable code, and the versions that they were judged for."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from packaging.version import Version

Severity = Literal["error", "warning", "note"]
_RANK: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
_JUDGED = ("deepspeed", "transformers", "bitsandbytes", "peft", "accelerate", "torch")


@dataclass(frozen=True)
class Versions:
    """Installed versions of the libraries whose behaviour the verdict depends on; None: not installed."""

    deepspeed: str | None = None
    transformers: str | None = None
    bitsandbytes: str | None = None
    peft: str | None = None
    accelerate: str | None = None
    torch: str | None = None

    @classmethod
    def installed(cls) -> Versions:
        """Read the versions of this environment, without importing the libraries."""
        return cls(**{name: _installed(name) for name in _JUDGED})

    def older(self, library: str, than: str) -> bool:
        """Whether a library is installed and older than a release."""
        found = getattr(self, library)
        return found is not None and Version(found) < Version(than)

    def __str__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name) or 'absent'}" for name in _JUDGED)


@dataclass(frozen=True)
class Finding:
    """One thing to know about model and config before training.

    Attributes:
        code: stable name, also the anchor of its section in docs/zero.md.
        severity: ``error``: it fails or trains on wrong weights. ``warning``: it trains, but not as intended.
            ``note``: worth knowing.
        key: the setting to look at (a DeepSpeed key, a loading argument, a module).
        value: what it is now.
        reason: what happens, and why.
        fix: what to do.
        symptom: the message of the library that a user meets without the guard; empty if nothing is said.
    """

    code: str
    severity: Severity
    key: str
    value: str
    reason: str
    fix: str
    symptom: str = ""

    def __str__(self) -> str:
        return f"{self.severity} [{self.code}] {self.key} = {self.value}: {self.reason} {self.fix}"


@dataclass(frozen=True)
class ZeroReport:
    """Everything the guard found, worst first.

    Attributes:
        subject: what was judged: ``live model``, ``engine`` or ``plan``.
        config: where the training config came from.
        findings: sorted by severity.
        versions: the versions that the verdict is for.
    """

    subject: str
    config: str
    findings: tuple[Finding, ...]
    versions: Versions = field(default_factory=Versions)

    COLUMNS = ("severity", "code", "key", "value", "reason", "fix")

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that forbid training."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that do not forbid training, but should be read."""
        return tuple(f for f in self.findings if f.severity == "warning")

    @property
    def ok(self) -> bool:
        """Whether nothing forbids training."""
        return not self.errors

    @property
    def exit_code(self) -> int:
        """What scripts exit with: 0 for notes at most, 1 for errors, 3 for warnings only (2 is left to wrong usage)."""
        if self.errors:
            return 1
        return 3 if self.warnings else 0

    def rows(self) -> list[tuple[str, ...]]:
        """Return one row per finding, in the order of ``COLUMNS``, for a table."""
        return [tuple(str(getattr(f, column)) for column in self.COLUMNS) for f in self.findings]

    def __str__(self) -> str:
        head = f"{self.subject} with {self.config}: " + ("works" if self.ok else "does not work")
        judged = f"(judged for {self.versions})"
        return "\n  ".join([head, *map(str, self.findings), judged])


def by_severity(findings: list[Finding]) -> tuple[Finding, ...]:
    """Sort findings, worst first, otherwise in the order in which the rules stand."""
    return tuple(sorted(findings, key=lambda f: _RANK[f.severity]))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
