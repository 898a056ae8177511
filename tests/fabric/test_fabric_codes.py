"""Codes: each is raised by the product, planted by a test, explained in the documentation; the pages are generated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.fabric import catalogue
from launcher.fabric.codes import CODES
from launcher.fabric.reference import DOCTOR, VARIABLES, codes_section, filled, variables_section

ROOT = Path(__file__).parents[2]
PRODUCT = "\n".join(
    path.read_text() for path in sorted((ROOT / "launcher/fabric").glob("*.py")) if path.name not in ("codes.py",)
)
TESTS = "\n".join(
    path.read_text() for path in sorted((ROOT / "tests/fabric").glob("*.py")) if path.name != Path(__file__).name
)


@pytest.mark.parametrize("code", CODES)
def test_code_is_raised_planted_and_explained(code: str) -> None:
    row = CODES[code]
    assert f'"{code}"' in PRODUCT
    assert f'"{code}"' in TESTS
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
    assert row.cause
    assert row.fix


def test_the_product_says_no_other_code() -> None:
    said = set(re.findall(r'(?:finding|said|Problem|_say)\(\s*(?:view, )?"([a-z0-9-]+)"', PRODUCT))
    assert said <= set(CODES)
    assert len(said) > 60


@pytest.mark.parametrize(("page", "section"), [(DOCTOR, codes_section), (VARIABLES, variables_section)])
def test_page_is_what_the_code_makes(page: str, section: object) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert text == filled(text, section()), "run: python -m launcher.fabric.reference"  # type: ignore[operator]


def test_every_main_variable_is_on_its_page() -> None:
    text = (ROOT / "docs" / VARIABLES).read_text()
    assert [row.name for row in catalogue.MAIN if f"| `{row.name}` |" not in text] == []
