"""Energy of the node's processors, from the counters that Linux keeps (RAPL)."""

from __future__ import annotations

from pathlib import Path


class Rapl:
    """Energy of the node's processors from ``/sys/class/powercap`` (Intel's and AMD's RAPL); most
    sites let only root read it."""

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        self._last: dict[Path, int] = {}
        # a counter starts again at zero after this many microjoules
        self._wraps: dict[Path, int] = {}
        self.missing: str | None = None
        try:
            # of packages "intel-rapl:0", of their parts "intel-rapl:0:1"
            for zone in sorted(root.glob("intel-rapl:*")):
                if zone.name.count(":") == 1 and (zone / "name").read_text(
                    encoding="ascii"
                ).startswith("package"):
                    self._wraps[zone] = (
                        int((zone / "max_energy_range_uj").read_text(encoding="ascii")) + 1
                    )
                    self._last[zone] = int((zone / "energy_uj").read_text(encoding="ascii"))
            if not self._last:
                self.missing = f"no processor in {root}"
        except (OSError, ValueError) as error:
            self.missing, self._last = f"{root}: {getattr(error, 'strerror', None) or error}", {}

    def added_j(self) -> float | None:
        """Joules since the last call. Whoever shares the node is in them."""
        total = 0.0
        for zone, before in self._last.items():
            try:
                now = int((zone / "energy_uj").read_text(encoding="ascii"))
            except (OSError, ValueError):
                return None
            total += (now - before) % self._wraps[zone] / 1e6
            self._last[zone] = now
        return total if self._last else None
