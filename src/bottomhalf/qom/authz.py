# SPDX-License-Identifier: Apache-2.0
"""Who may come in: lists of rules for the names of clients (a certificate's distinguished name, for one).

The first rule that matches decides; none: the policy of the list.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, ClassVar, Final

from bottomhalf.qom.object import Property, QomObject, UserCreatable
from bottomhalf.qom.values import list_of, one_of, record, string

_policy: Final = one_of("deny", "allow")
_rules: Final = list_of(record({"format": one_of("exact", "glob")}, match=string, policy=_policy))


class Authz(QomObject, name="authz", abstract=True):
    """Something that can be asked whether a client may come in."""

    def is_allowed(self, identity: str) -> bool:
        """Whether the client of that name may."""
        raise NotImplementedError


class AuthzList(Authz, UserCreatable, name="authz-list"):
    """A list of rules."""

    properties: ClassVar[dict[str, Property]] = {
        "rules": Property(
            "QAuthZListRule",
            lambda self: self.rules,
            lambda self, value: setattr(self, "rules", _rules(value, "rules")),
        ),
        "policy": Property(
            "QAuthZListPolicy",
            lambda self: self.policy,
            lambda self, value: setattr(self, "policy", _policy(value, "policy")),
        ),
    }

    def __init__(self) -> None:
        super().__init__()
        self.policy = "deny"
        self.rules: list[dict[str, Any]] = []

    def is_allowed(self, identity: str) -> bool:
        for rule in self.rules:
            pattern = rule["match"]
            is_glob = rule.get("format") == "glob"
            if fnmatchcase(identity, pattern) if is_glob else identity == pattern:
                return bool(rule["policy"] == "allow")
        return self.policy == "allow"
