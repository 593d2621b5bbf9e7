"""Lines that say what was found before the work starts: "ok", "warn" (the work runs, but not as
meant) or "FAIL" (it would be wasted)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """``fix`` is empty when all is well."""

    check: str
    level: str
    found: str
    fix: str = ""

    def line(self, width: int) -> str:
        """width: of the check's name."""
        text = f"{self.level:4}  {self.check:{width}}  {self.found}"
        return text + (f"; {self.fix}" if self.fix else "")
