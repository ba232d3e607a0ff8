"""What launchers work out once for all calls of one layout."""

from __future__ import annotations

from typing import Generic, TypeVar

_MOST = 4096  # layouts; variable lengths make many
Plan = TypeVar("Plan")


class Plans(dict[tuple, Plan], Generic[Plan]):
    """Plans by what decides them. Once there are too many, all are forgotten."""

    def keep(self, key: tuple, plan: Plan) -> Plan:
        """Store `plan`, and return it."""
        if len(self) >= _MOST:
            self.clear()
        self[key] = plan
        return plan
