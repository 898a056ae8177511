"""The page about the API names every field that the server knows, where it belongs and as what it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.server.schemas import Body, ChatBody, CompletionBody, MessagesBody, ResponsesBody, SamplingBody

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
SECTIONS: dict[str, tuple[type[Body], ...]] = {
    "Chat and completions": (ChatBody, CompletionBody),
    "Responses": (ResponsesBody,),
    "Messages": (MessagesBody,),
}


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def row(title: str, name: str) -> str:
    return "".join(line for line in section(title).splitlines() if line.startswith(f"| {name} |"))


def named(text: str) -> set[str]:
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"[a-z_]+", code)}


@pytest.mark.parametrize("title", SECTIONS)
def test_every_field_is_on_the_page(title: str) -> None:
    common = named(section("For all routes"))
    for body in SECTIONS[title]:
        missing = set(body.__struct_fields__) - named(section(title)) - common
        assert missing == set(), f"{body.__name__} takes fields that docs/api.md does not tell"
        assert set(body.IGNORED) - set(body.__struct_fields__) <= named(row(title, "ignored"))
        assert set(body.UNSUPPORTED) - set(SamplingBody.UNSUPPORTED) <= named(row(title, "refused"))
    assert set(SamplingBody.UNSUPPORTED) <= common


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_tells_of_no_other_ignored_or_refused_field(title: str) -> None:
    for name, attribute in (("ignored", "IGNORED"), ("refused", "UNSUPPORTED")):
        known = {field for body in SECTIONS[title] for field in (*getattr(body, attribute), *body.__struct_fields__)}
        first_words = set(re.findall(r"`([a-z_]+)[`:]", row(title, name)))
        assert first_words - known <= {"anthropic", "echo", "false", "disabled", "n"}
