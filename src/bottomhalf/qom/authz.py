# SPDX-License-Identifier: Apache-2.0
"""Who may come in: lists of rules for the names of clients (a certificate's distinguished name, for one).

The first rule that matches decides; none: the policy of the list. In a pattern, ``*`` stands for any characters and
``?`` for one; everything else, brackets too, for itself.

They are asked from the threads of monitors as well. What they are asked for is replaced as a whole, never changed.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from bottomhalf.qom.object import Property, QomObject, UserCreatable
from bottomhalf.qom.values import list_of, one_of, record, string

PATTERN_CHARACTERS_MAX: Final = 8192  # as many as a name may have
_policy: Final = one_of("deny", "allow")
_rules: Final = list_of(record({"format": one_of("exact", "glob")}, match=string, policy=_policy))


class Authz(QomObject, name="authz", abstract=True):
    """Something that can be asked whether a client may come in."""

    def is_allowed(self, identity: str) -> bool:
        """Whether the client of that name may."""
        raise NotImplementedError


class AuthzSimple(Authz, UserCreatable, name="authz-simple"):
    """One name."""

    properties: ClassVar[dict[str, Property]] = {
        "identity": Property.of("string", "identity", string),
    }

    def __init__(self) -> None:
        super().__init__()
        self.identity = ""

    def is_allowed(self, identity: str) -> bool:
        return identity == self.identity


class AuthzList(Authz, UserCreatable, name="authz-list"):
    """A list of rules."""

    properties: ClassVar[dict[str, Property]] = {
        "rules": Property.of("QAuthZListRule", "rules", _rules),
        "policy": Property.of("QAuthZListPolicy", "policy", _policy),
    }

    def __init__(self) -> None:
        super().__init__()
        self.policy = "deny"
        self.rules: list[dict[str, Any]] = []

    def is_allowed(self, identity: str) -> bool:
        for rule in self.rules:
            pattern = rule["match"]
            is_glob = rule.get("format") == "glob"
            if matches(pattern, identity) if is_glob else identity == pattern:
                return bool(rule["policy"] == "allow")
        return self.policy == "allow"


def matches(pattern: str, text: str) -> bool:
    """Whether all of ``text`` is what ``pattern`` describes. The time is bounded by the product of their lengths: only
    the last ``*`` is ever tried again, which is enough."""
    if len(pattern) > PATTERN_CHARACTERS_MAX:
        return False
    at, place = 0, 0
    star, resume = -1, 0
    while place < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, resume = at, place
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", text[place]):
            at += 1
            place += 1
        elif star >= 0:
            resume += 1
            at, place = star + 1, resume
        else:
            return False
    return pattern[at:].strip("*") == ""
